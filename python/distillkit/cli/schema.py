"""`distillkit schema`: JSON schemas of the two kinds of YAML files; and the page docs/settings.md, from the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from distillkit.capture.settings import CaptureSettings
from distillkit.capture.settings_file import captures_schema
from distillkit.configuration.describe import json_schema, section_tables
from distillkit.training.config.file import training_schema
from distillkit.training.config.schema import RunConfig

__all__ = ["schema", "settings_page"]

SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {"train": training_schema, "capture": captures_schema}


@click.command(short_help="Print the JSON schema of a configuration file.")
@click.argument("kind", type=click.Choice(list(SCHEMAS)))
def schema(kind: str) -> None:
    """Print the JSON schema of a configuration file: of `distillkit config.yaml` (train) or of `distillkit capture
    FILE.yaml` (capture).

    With it, editors complete settings and mark mistakes. Save it, and begin the YAML file with this line:

    \b
      # yaml-language-server: $schema=train.schema.json
    """
    click.echo(json.dumps(SCHEMAS[kind](), indent=2, ensure_ascii=False))


_PAGE = """# Settings

Generated from the code by `make docs`; do not edit.

A YAML file has the settings of a training run (`distillkit config.yaml`) or of captures
(`distillkit capture captures.yaml`). Unknown settings and values that are not allowed are all
reported at once, before anything is loaded.

Editors that know the YAML language server complete settings, show what they mean and mark mistakes.
Write the JSON schemas to files, and begin a YAML file with a line that names its schema, as below:

```bash
distillkit schema train > train.schema.json
distillkit schema capture > capture.schema.json
```

## Training

```yaml
# yaml-language-server: $schema=train.schema.json
model: ./student
output_path: ./trained
sequence_length: 1024
dataset:
  train_dataset: {{disk_path: ./captured}}
teacher: {{kind: dataset}}
```

{training}

## Captures

Every setting is also an option of `distillkit capture` (`--max-seq-len 2048`) and an argument of
`distillkit.capture.capture`. Settings of an engine are given in its section or flat
(`tensor_parallel_size: 4`). Under `captures`, a file lists the settings in which several captures
differ.

```yaml
# yaml-language-server: $schema=capture.schema.json
dataset: ./text.jsonl
engine: vllm
vllm: {{tensor_parallel_size: 4}}
captures:
- {{model: ./teacher-8b, output: ./captured-8b}}
- {{model: ./teacher-70b, output: ./captured-70b, max_seq_len: 2048}}
```

{capture}
"""


def settings_page() -> str:
    """Write docs/settings.md: every setting of both kinds of files, in a table a section."""
    tables = {
        "training": section_tables(json_schema(RunConfig)),
        "capture": section_tables(json_schema(CaptureSettings)),
    }
    return _PAGE.format(**{name: "\n\n".join(parts) for name, parts in tables.items()})


if __name__ == "__main__":
    click.echo(settings_page(), nl=False)
