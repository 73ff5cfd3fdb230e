"""Probes in scikit-learn: cross-validation, a grid search, and a probe to serve.

A notebook in cells: run them one by one in an editor, or all of them with python.
"""

# %% Labelled texts, written for demonstration
import json
import os
from pathlib import Path
from tempfile import mkdtemp

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score

import sidelight

file = Path(sidelight.__file__).parent / "demo" / "data" / "urgency_train.jsonl"
rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
texts, labels = ([row[column] for row in rows] for column in ("text", "label"))

# %% Cross-validation, of texts alone: background traffic around them takes longer
model = os.environ.get("SIDELIGHT_MODEL", "smollm2")
classifier = sidelight.SidelightClassifier(model, mechanism="pooling", background="none")
scores = cross_val_score(classifier, texts, labels, cv=2)
print("Accuracy by fold:", scores.round(2))

# %% A grid search: each fit reads its texts, unless keep_cache=True keeps their hidden states
settings = {"learning_rate": [0.005, 0.02]}
search = GridSearchCV(classifier, settings, cv=2, scoring="neg_log_loss").fit(texts, labels)
print("Best:", search.best_params_)

# %% Probabilities of new texts
best = search.best_estimator_
new = ["The payment page has been down for an hour.", "When does the library open?"]
for text, row in zip(new, best.predict_proba(new), strict=True):
    print(text, dict(zip(best.classes_.tolist(), row.round(3).tolist(), strict=True)))

# %% The same settings in background traffic, to serve; a warning says what that costs
served = clone(best).set_params(background="packaged").fit(texts, labels)
folder = served.save(f"{mkdtemp()}/urgency")
print(sidelight.load(folder, model=model).predict(new))
print(f"Next: sidelight serve --probe {folder}")
