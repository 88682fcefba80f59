"""What a user can set, and how it is read."""

from gradclip.config.load import PolicyLike, as_config, load_section, load_yaml, parse_mapping
from gradclip.config.models import AlarmConfig, ClipConfig, GroupConfig, LogConfig, RecorderConfig

__all__ = [
    "AlarmConfig",
    "ClipConfig",
    "GroupConfig",
    "LogConfig",
    "PolicyLike",
    "RecorderConfig",
    "as_config",
    "load_section",
    "load_yaml",
    "parse_mapping",
]
