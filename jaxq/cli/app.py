"""The typer application: commands, and how their errors end."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jaxq.cli import commands
from jaxq.cli.bench import bench
from jaxq.cli.console import Remarks, complain, remember_interrupts
from jaxq.cli.importing import import_model
from jaxq.cli.quantize import quantize
from jaxq.errors import JaxqError


class Commands(TyperGroup):
    """Commands whose errors are one line on stderr: exit code 2 for bad input, 130 for an interrupt."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except JaxqError as error:
        complain(" ".join(str(error).split()))
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        complain("interrupted; nothing was written")
        raise typer.Exit(130) from error
    except Exception as error:
        # What typer raises for a wrong option or argument; its class has moved between releases.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "jaxq")
        complain(f"{' '.join(message().split())} (see {command} --help)")
        raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    name="jaxq",
    help="Post-training quantization of language and image models in JAX.",
    epilog="MODEL is a Hugging Face or timm directory, a .gguf file, or the name of a demo model (smollm2-135m, "
    "vit-fashion). OUT is a directory that [bold]jaxq quantize[/bold] wrote.",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"jaxq {metadata.version('jaxq')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _examples(*lines: str) -> str:
    # A blank line between them: help text is reflowed, paragraph by paragraph.
    return "\n\n".join(["[bold]Examples[/bold]", *(f"[cyan]$ {line}[/cyan]" for line in lines)])


for _command, _name, _lines in (
    (commands.sites, "sites", ("jaxq sites smollm2-135m", "jaxq sites model.gguf --json | jq '.[].path'")),
    (
        quantize,
        "quantize",
        (
            "jaxq quantize smollm2-135m out --recipe gptq --bits 3 --group-size 64 --calibration essays",
            "jaxq quantize smollm2-135m out --recipe squeezellm --bits 3 --sparsity 0.0045 --calibration essays",
            "jaxq quantize ./llama out --recipe rtn --bits 4 --dry-run",
            "jaxq quantize ./llama out --recipe mine.toml --calibration notes.txt --overwrite",
            "jaxq quantize ./vit out --recipe gptq --bits 4 --calibration fashion-mnist --samples 128 --batch 32",
            "jaxq quantize vit-fashion out --recipe aphq-vit --weights 3 --activations 3 --set iterations=1000",
        ),
    ),
    (
        commands.evaluate,
        "eval",
        (
            "jaxq eval out --data essays",
            "jaxq eval ./vit --metric top1 --data fashion-mnist --json",
            "jaxq eval out --metric top1 --data fashion-mnist --integer",
            "jaxq eval smollm2-135m --metric perplexity --data notes.txt --windows 40 --seq-len 512 --json",
        ),
    ),
    (
        commands.generate,
        "generate",
        (
            'jaxq generate out --prompt "It is a truth universally acknowledged"',
            'jaxq generate out --prompt "What is a prime number?" --chat --temperature 0.7 --seed 1',
        ),
    ),
    (
        import_model,
        "import",
        (
            "jaxq import sq-vicuna-7b-w3-s45.pt out --model ./vicuna-7b",
            "jaxq import ./packed out --model ./llama --json --overwrite",
        ),
    ),
    (commands.inspect, "inspect", ("jaxq inspect out", "jaxq inspect out --verify --json")),
    (
        bench,
        "bench",
        ("jaxq bench kernels", "jaxq bench kernels --shapes 4096x11008 --batch 1,8 --json"),
    ),
    (
        commands.recipes,
        "recipes",
        ("jaxq recipes", "jaxq recipes gptq --bits 3 --group-size 64 > mine.toml"),
    ),
):
    app.command(_name, epilog=_examples(*_lines))(_command)


def main() -> None:
    """The `jaxq` program."""
    # transformers only reads tokenizers here, and would say at each start that it misses PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    remember_interrupts()
    log = logging.getLogger("jaxq")
    log.setLevel(logging.INFO)
    log.addHandler(Remarks())
    # Libraries that it uses may write everything to stderr a second time.
    log.propagate = False
    app()
