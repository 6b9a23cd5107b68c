"""A patch set's own requests on an upgraded base: which to train again and how, the training, and what holds afterwards."""

from xpatch.upgrade.report import EditReport, LanguageReport, UpgradeReport
from xpatch.upgrade.runner import Retrained, retrain

__all__ = ["EditReport", "LanguageReport", "Retrained", "UpgradeReport", "retrain"]
