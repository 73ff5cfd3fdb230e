"""What follows from verdicts: rules, and their enforcement on each request."""

from sidelight.server.policy.clauses import (
    Clause,
    clauses_of,
    require_fitting,
    require_fitting_probe,
)
from sidelight.server.policy.decisions import Action, Decision
from sidelight.server.policy.enforcement import Enforcement
from sidelight.server.policy.files import read_policy
from sidelight.server.policy.rules import Policy, Rule
from sidelight.server.policy.system_turns import require_read
from sidelight.server.policy.wishes import Wish, Wishes, tightened

__all__ = [
    "Action",
    "Clause",
    "Decision",
    "Enforcement",
    "Policy",
    "Rule",
    "Wish",
    "Wishes",
    "clauses_of",
    "read_policy",
    "require_fitting",
    "require_fitting_probe",
    "require_read",
    "tightened",
]
