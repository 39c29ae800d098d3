"""On-policy training: the student writes completions of prompts, the teacher scores them, and the losses run on their
tokens.

`order` decides which training rows are completions, and of which prompts; `engine` writes them; `rounds` ties both to
the trainer.
"""
