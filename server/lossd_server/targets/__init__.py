"""Target assignment: which location of a feature pyramid answers for which object."""

from lossd_server.targets.assignment import BYTES_OF_POSITIVE, Assignment, DenseLevel, SparseTargets
from lossd_server.targets.box_format import BoxFormat
from lossd_server.targets.fcos import DEFAULT_RANGES, DEFAULT_STRIDES, FCOSAssigner
from lossd_server.targets.ground_truth import GroundTruth
from lossd_server.targets.presets import AssignerPreset
from lossd_server.targets.pyramid import feature_sizes

__all__ = [
    "BYTES_OF_POSITIVE",
    "DEFAULT_RANGES",
    "DEFAULT_STRIDES",
    "AssignerPreset",
    "Assignment",
    "BoxFormat",
    "DenseLevel",
    "FCOSAssigner",
    "GroundTruth",
    "SparseTargets",
    "feature_sizes",
]
