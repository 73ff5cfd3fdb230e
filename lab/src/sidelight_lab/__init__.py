"""Sidelight: text and classification from one forward pass.

    import sidelight

    clf = sidelight.train("smollm2", "train.jsonl", mechanism="readout")
    print(clf.evaluate("test.jsonl").to_dict()["auprc"])
    clf.save("probes/mine")

Names are loaded on first use, so ``import sidelight`` is fast.
"""
