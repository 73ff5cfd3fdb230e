"""The ``sidelight`` command. Each subcommand is a file; heavy modules are imported when it runs."""

import os
import sys
from importlib import import_module
from typing import Any

import click

from sidelight.cli import options
from sidelight.cli.evaluate import evaluate, parity, predict
from sidelight.cli.guard import guard
from sidelight.cli.inspect import inspect
from sidelight.cli.policy import policy
from sidelight.cli.recalibrate import recalibrate
from sidelight.cli.train import train
from sidelight.errors import SidelightError, how_to_install
from sidelight.extensions import extension_names, load_extension

_GROUP = "sidelight.commands"
# Commands of packages that may not be installed.
_PACKAGES = {
    "label": "label",
    **dict.fromkeys(("anatomy", "bench", "redteam", "reproduce", "search"), "lab"),
}
_RESUMED = ("train", "guard", "demo", "label", "search", "reproduce")
_SERVING = ("fastapi", "openai", "prometheus_client", "uvicorn")


class _Commands(click.Group):
    """Sidelight's commands, and those of installed packages in the group `sidelight.commands`."""

    def invoke(self, ctx: click.Context) -> Any:
        with options.printed_warnings() as printed:
            ctx.meta[options.PRINTED_WARNINGS] = printed
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *extension_names(_GROUP)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if command := super().get_command(ctx, cmd_name):
            return command
        if command := load_extension(_GROUP, cmd_name):
            return command
        if package := _PACKAGES.get(cmd_name):
            raise SidelightError(
                f"'sidelight {cmd_name}' belongs to the package sidelight-{package}, which is not "
                f"installed. {how_to_install(f'./packages/{package}')}"
            )
        return None


@click.group(
    cls=_Commands,
    context_settings={
        "max_content_width": 100,
        "help_option_names": ["-h", "--help"],
        "show_default": True,
    },
)
@click.version_option(package_name="sidelight")
def app() -> None:
    """Text and classification from one forward pass of the LLM you already serve.

    Commands use at most as many CPU threads as the container's quota allows. Set OMP_NUM_THREADS
    to use another number.
    """


def _serve() -> click.Command:
    """The command, or one that says what to install, because its options come from its
    dependencies.
    """
    try:
        from sidelight.cli.serve import serve
    except ModuleNotFoundError as error:
        missing = error

        def refuse() -> None:
            raise missing

        return click.Command(
            "serve",
            callback=refuse,
            short_help="Serve an LLM and its probes (needs the extra 'serve').",
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )
    return serve


@click.command(epilog=options.examples("sidelight demo", "sidelight demo --keep --port 8123"))
@click.option("--keep", is_flag=True, help="Leave the server running until Ctrl-C.")
@options.free_port
def demo(keep: bool, port: int) -> None:
    """Run five chats through the guards of the embedded model, then train a probe.

    The chats use the openai client and a policy that blocks injections. The probe is trained on
    240 labelled texts and classifies intents.
    """
    # Report missing server packages before the model is loaded.
    import_module("sidelight.server.app")
    from sidelight.demo import run_demo

    run_demo(keep=keep, port=port)


_COMMANDS = (train, guard, evaluate, recalibrate, predict, parity, inspect, policy, demo)
for _command in (*_COMMANDS, _serve()):
    app.add_command(_command)


def limit_threads() -> None:
    """Set OpenMP's wait policy, and its threads under a CPU quota, unless the user has set them.

    By default, OpenMP's threads spin while they wait, so next to another busy process, two of them
    can be slower than one. This must be set before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from joblib import cpu_count

    if cpu_count() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cpu_count()))


def main() -> None:
    """Run the command; an error that the user can fix is one line with exit code 2."""
    # Subprocesses of vLLM and multiprocessing would import from the working directory first.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        limit_threads()
        app(standalone_mode=False)
    except SidelightError as error:
        _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "sidelight"
        _fail(f"{error.format_message()} (see '{command} --help')")
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        is_resumed = sys.argv[1:2] and sys.argv[1] in _RESUMED
        remedy = " Run the same command again to resume."
        print(f"Stopped.{remedy if is_resumed else ''}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has exited; Python must not write the rest at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        remedy = "Check the path, its permissions, and the free space."
        _fail(f"{error.strerror}{place}. {remedy}" if error.strerror else str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _SERVING:
            _fail(f"A server needs the package {package}. {how_to_install('.[serve]')}")
        # Sidelight's packages are named like their folders.
        ours, _, name = package.partition("_")
        if ours != "sidelight":
            raise
        _fail(f"This needs the package {ours}-{name}. {how_to_install(f'./packages/{name}')}")


def _fail(message: str) -> None:
    from sidelight.types import visible

    print(f"Error: {visible(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)
