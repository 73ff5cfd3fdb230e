"""Probes in scikit-learn: cross-validation, a grid search, and a probe to serve.

A notebook in cells: run them one by one in an editor, or all of them with python.
"""

# %% Labelled texts
import os
from tempfile import mkdtemp

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score

import sidelight

POLITE = (
    "Thank you",
    "Many thanks",
    "Much appreciated",
    "You are very kind",
    "Please take your time",
)
RUDE = "This is useless", "What a waste", "You are no help", "Do your job", "I am sick of this"
ABOUT = "the parcel came", "my refund", "the new login", "your last answer"
texts = [f"{opening}: {topic}" for opening in (*POLITE, *RUDE) for topic in ABOUT]
labels = ["polite"] * 20 + ["rude"] * 20

# %% Cross-validation, of texts alone: ordinary traffic around them takes longer
model = os.environ.get("SIDELIGHT_MODEL", "smollm2")
classifier = sidelight.SidelightClassifier(model, mechanism="pooling", background="none")
scores = cross_val_score(classifier, texts, labels, cv=2)
print("Accuracy by fold:", scores.round(2))

# %% A grid search: the model has read these texts, and does not read them again
settings = {"learning_rate": [0.005, 0.02]}
search = GridSearchCV(classifier, settings, cv=2, scoring="neg_log_loss").fit(texts, labels)
print("Best:", search.best_params_)

# %% Probabilities of new texts
best = search.best_estimator_
for text, row in zip(new := ["Thanks a lot!", "Useless."], best.predict_proba(new), strict=True):
    print(text, dict(zip(best.classes_.tolist(), row.round(3).tolist(), strict=True)))

# %% The same settings in ordinary traffic, to serve
served = clone(best).set_params(background="packaged").fit(texts, labels)
folder = served.save(f"{mkdtemp()}/manners")
print(sidelight.load(folder, model=model).predict(new))
print(f"Next: sidelight serve --probe {folder}")
