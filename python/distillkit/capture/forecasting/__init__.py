"""What a capture will cost: tokens, time, memory and disk, estimated before it is run."""
