"""What all files of settings share: reading YAML, reporting every problem at once, describing each setting once."""
