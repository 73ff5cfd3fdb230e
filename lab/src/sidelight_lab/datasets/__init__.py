"""The official data sets by name, in their official splits. Knows texts, not token ids.

`load_data_set` reads from a folder named after the set, with one file per split in any format of
`load_examples` (.jsonl, .csv, .parquet, ...; text also with .gz), else from the Hugging Face hub:

- `toxicchat`: folder `toxicchat0124`, files `train` and `test`, columns `text` (or the hub's
  `user_input`), `toxicity`, and `human_annotation` for the subset "human".
- `sst2`: files `train_sentences`, `validation` and `test`, columns `text` (or the hub's
  `sentence`) and `label`.
- `emotion`: files `train`, `validation` and `test`, columns `text` and `label_name` (or the hub's
  `label`).
- `imdb`: files `train` and `test`, columns `text` and `label`.
- `wildguardmix`: files `train` and `test`, columns `prompt`, `prompt_harm_label`, and
  `adversarial` for the subsets "adversarial" and "vanilla".

A column for subsets may be absent. `from_files` makes a data set of any files.
"""
