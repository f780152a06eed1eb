"""A doctor of finished runs: rules over what a store has recorded, see `diagnose`."""

from fakit.experiments.doctor.diagnosis import RULES, Diagnosis, diagnose
from fakit.experiments.doctor.rule import Finding, Rule

__all__ = ["RULES", "Diagnosis", "Finding", "Rule", "diagnose"]
