"""The commands: `distillkit` (train, capture, …) and `distillkit-codec` (inspect, verify, convert, bench)."""
