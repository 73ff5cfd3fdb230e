"""Models fine-tuned with peft and transformers' Trainer: LoRA on the backbone, and an encoder."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.probes.ragged import by_length
from sidelight.progress import progress
from sidelight.training.dataset import Split
from sidelight.training.optimisation import make_loss, validation_score
from sidelight.training.preparing import ProbeDataset
from sidelight_lab.baselines.base import Baseline, FittedBaseline
from sidelight_lab.baselines.encoders import Encoder, packaged_encoder
from sidelight_lab.baselines.training import finite

# A text in the format of transformers' Trainer: input_ids, read (mask of pooled tokens), labels.
Item = dict[str, Tensor]
# Label of unlabelled tokens, as in transformers.
UNLABELLED = -100
# Tokens per forward and backward pass, padding included: activations for the latter are large.
_PASS_TOKENS = 8192


class SequenceClassifier(nn.Module):
    """A linear head on the mean last hidden state of the tokens that are read.

    Args:
        body: A model of ``transformers`` without its language-model head.
        dataset: Data to train on.
        labels_tokens: Whether to classify each token that is read, instead of their mean.
    """

    def __init__(self, body: Any, dataset: ProbeDataset, *, labels_tokens: bool = False):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.hidden_size, dataset.task.outputs)
        labels = torch.from_numpy(dataset.training.labels)
        self._loss = make_loss(dataset.task, labels, balanced=False)
        self._labels_tokens = labels_tokens

    def forward(
        self,
        input_ids: Int[Tensor, "text token"],
        present: Bool[Tensor, "text token"],
        read: Bool[Tensor, "text token"],
        labels: Int[Tensor, "text ..."],
    ) -> dict[str, Tensor]:
        """Compute the loss and the logits in float32; the body always runs in bfloat16."""
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16):
            output = self.body(input_ids=input_ids, attention_mask=present.long())
        hidden = output.last_hidden_state.float()
        if self._labels_tokens:
            logits = self.head(hidden)
            return {"loss": self._loss(logits[read], labels[read]), "logits": logits}
        logits = self.head((hidden * (read / read.sum(1, keepdim=True))[:, :, None]).sum(1))
        return {"loss": self._loss(logits, labels), "logits": logits}


class FineTuned(Baseline):
    """A full model trained with AdamW: linear warm-up, then cosine decay to zero.

    Attributes:
        learning_rate: Learning rate at the end of the warm-up.
        epochs: Passes over the data; the epoch with the best validation score is kept.
        batch_size: Texts per step, of similar length.
    """

    is_single_pass: ClassVar[bool] = False
    learning_rate: float
    epochs: int
    batch_size: int

    def tune(
        self,
        model: nn.Module,
        dataset: ProbeDataset,
        encode: Callable[[Split], list[Item]],
        *,
        seed: int,
        folder: Path | None = None,
    ) -> FittedBaseline:
        """Train the parameters that require gradients.

        Args:
            model: A ``SequenceClassifier``, or a peft model around one.
            dataset: The data.
            encode: Function that converts texts to items.
            seed: Seed of dropout and of the order of the texts.
            folder: Folder for checkpoints, one after each epoch; None removes them afterwards.

        Raises:
            SidelightError: The logits are no longer finite.
        """
        from transformers.trainer import Trainer
        from transformers.trainer_callback import PrinterCallback, TrainerCallback
        from transformers.training_args import TrainingArguments

        if folder is None:
            with TemporaryDirectory() as scratch:
                return self.tune(model, dataset, encode, seed=seed, folder=Path(scratch))
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        training, validation = encode(dataset.training), encode(dataset.validation)

        def metrics(evaluated: Any) -> dict[str, float]:
            logits = finite(evaluated.predictions, learning_rate=self.learning_rate)
            labels = evaluated.label_ids
            if labels.ndim == 3:
                is_labelled = labels[..., 0] != UNLABELLED
                logits, labels = logits[is_labelled], labels[is_labelled]
            return {"score": validation_score(dataset.task, logits, labels)}

        fitting = max(1, _PASS_TOKENS // max(len(item["input_ids"]) for item in training))
        pass_texts = next(n for n in range(fitting, 0, -1) if self.batch_size % n == 0)
        arguments = TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            learning_rate=self.learning_rate,
            weight_decay=0.01,
            warmup_steps=0.06,
            lr_scheduler_type="cosine",
            num_train_epochs=self.epochs,
            per_device_train_batch_size=pass_texts,
            gradient_accumulation_steps=self.batch_size // pass_texts,
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="epoch",
            # Keep the best epoch and the last one.
            save_total_limit=2,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
            use_cpu=dataset.reader.device.type == "cpu",
        )
        steps = -(-len(training) // self.batch_size) * self.epochs
        with torch.random.fork_rng(), progress(self.title, steps, unit="steps") as advance:

            class Steps(TrainerCallback):
                def on_step_end(self, *_: Any, **__: Any) -> None:
                    advance(1)

            trainer = Trainer(
                model,
                arguments,
                data_collator=_padded,
                train_dataset=training,  # pyright: ignore[reportArgumentType]
                eval_dataset=validation,  # pyright: ignore[reportArgumentType]
                compute_metrics=metrics,
                callbacks=[Steps()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        model.eval().requires_grad_(False)
        return FittedBaseline(lambda split: np.stack(score_items(model, encode(split))), parameters)


def _padded(items: Sequence[Item]) -> dict[str, Tensor]:
    """Collate items into a batch, padded on the right."""
    present = [torch.ones_like(item["read"]) for item in items]
    labels = [item["labels"] for item in items]
    of_tokens = labels[0].dim() == 2
    return {
        "input_ids": pad_sequence([item["input_ids"] for item in items], batch_first=True),
        "present": pad_sequence(present, batch_first=True),
        "read": pad_sequence([item["read"] for item in items], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=UNLABELLED)
        if of_tokens
        else torch.stack(labels),
    }


@torch.inference_mode()
def score_items(model: nn.Module, items: Sequence[Item]) -> list[Float[np.ndarray, "*_ output"]]:
    """Logits of each text, or of each of its tokens, followed by padding."""
    model.eval()
    device = next(model.parameters()).device
    lengths = [len(item["input_ids"]) for item in items]
    found: dict[int, np.ndarray] = {}
    with progress("Scoring", sum(lengths), unit="tokens") as advance:
        for rows in by_length(lengths):
            batch = _padded([items[row] for row in rows])
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()})["logits"]
            found |= dict(zip(rows, logits.cpu().numpy(), strict=True))
            advance(sum(lengths[row] for row in rows))
    return [found[row] for row in range(len(items))]


@dataclass(frozen=True)
class Lora(FineTuned):
    """LoRA on every linear layer of the decoder blocks, with a linear head.

    Not single-pass: generating text needs another pass, with the unchanged weights.

    Attributes:
        rank: Rank (r) of each weight update.
        alpha: Updates are multiplied by ``alpha / rank``.
        dropout: Dropout rate on the input of each update.
    """

    title: ClassVar[str] = "LoRA fine-tuning"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    learning_rate: float = 5e-4
    epochs: int = 3
    batch_size: int = 32

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fit the adapters and the head; the epoch is chosen on the validation texts."""
        return self.tune(self.adapted(dataset, seed=seed), dataset, prompt_items, seed=seed)

    def adapted(self, dataset: ProbeDataset, *, seed: int) -> nn.Module:
        """Wrap the backbone in untrained adapters and a head; the backbone itself is unchanged."""
        from peft import LoraConfig, get_peft_model

        backbone = dataset.reader
        assert isinstance(backbone, TransformersBackbone)
        # Copy the modules, but share their parameters.
        body: Any = backbone.model.base_model
        body = copy.deepcopy(body, {id(weight): weight for weight in body.parameters()})
        # On CPUs, the fused kernel's backward pass is several times slower than the eager one.
        body.set_attn_implementation("eager")
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            target_modules="all-linear",
            exclude_modules=["head"],
            modules_to_save=["head"],
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = SequenceClassifier(body, dataset)
            return get_peft_model(model, config).to(dataset.reader.device)  # pyright: ignore[reportArgumentType]


def prompt_items(split: Split) -> list[Item]:
    """Items of the backbone's tokens, pooled over those that a probe would read."""
    reads, labels = split.states.reads, torch.from_numpy(split.labels)
    return [
        {"input_ids": torch.tensor(prompt.token_ids), "read": prompt.mask(reads), "labels": label}
        for prompt, label in zip(split.states.prompts, labels, strict=True)
    ]


@dataclass(frozen=True)
class FineTunedEncoder(FineTuned):
    """A fully fine-tuned small sentence encoder, with a linear head on its mean token.

    Not single-pass: a second model reads every text.

    Attributes:
        path: Folder or hub id of an encoder; None selects the packaged MiniLM.
        max_tokens: Maximum length, or the encoder's limit if that is lower; longer texts are
            truncated at the end.
    """

    title: ClassVar[str] = "Fine-tuned encoder"
    path: str | None = None
    learning_rate: float = 1e-4
    epochs: int = 4
    batch_size: int = 32
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.path is None:
            packaged_encoder()

    def fit(self, dataset: ProbeDataset, *, seed: int) -> FittedBaseline:
        """Fit all weights; the epoch is chosen on the validation texts."""
        encoder = Encoder(self.path, max_tokens=self.max_tokens)

        def encode(split: Split) -> list[Item]:
            texts = map(torch.tensor, encoder.tokens(split.texts)["input_ids"])
            return [
                {"input_ids": ids, "read": torch.ones_like(ids, dtype=torch.bool), "labels": label}
                for ids, label in zip(texts, torch.from_numpy(split.labels), strict=True)
            ]

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = SequenceClassifier(encoder.body, dataset).to(dataset.reader.device)
        return self.tune(model, dataset, encode, seed=seed)
