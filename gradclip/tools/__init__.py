"""Offline tools: traces, replays, checks and reports. Run as `gradclip`; see docs/commands.md."""
