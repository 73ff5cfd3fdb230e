"""``sidelight demo``: the main job from end to end."""

from importlib import import_module

import click

from sidelight.cli.options import examples_epilog


@click.command(epilog=examples_epilog("sidelight demo", "sidelight demo --keep --port 8123"))
@click.option("--keep", is_flag=True, help="Leave the server running until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="[default: a free one]")
def demo(keep: bool, port: int) -> None:
    """Train three small probes on the embedded model, serve them, and ask one question.

    The texts are the bundled example set, which is written for demonstration.
    """
    # If the packages of a server are missing, say so before anything is trained.
    import_module("sidelight.server.app")
    from sidelight.demo import run_demo

    run_demo(keep=keep, port=port)
