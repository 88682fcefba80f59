"""What a user can set, and how it is read."""

from gradclip.config.load import (
    PolicyLike,
    as_config,
    config_from_environment,
    load_section,
    load_yaml,
    parse_mapping,
)
from gradclip.config.models import AlarmConfig, ClipConfig, GroupConfig, LogConfig, RecorderConfig

__all__ = [
    "AlarmConfig",
    "ClipConfig",
    "GroupConfig",
    "LogConfig",
    "PolicyLike",
    "RecorderConfig",
    "as_config",
    "config_from_environment",
    "load_section",
    "load_yaml",
    "parse_mapping",
]
