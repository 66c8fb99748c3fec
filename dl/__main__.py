"""``python -m dl``: check, caption, demo, run (what ``./run_all.sh`` calls), embed and fit (under accelerate)."""
from __future__ import annotations

import argparse
import ast
import os
import sys
from pathlib import Path

from dl.config import AUDIO_SUFFIXES, PROFILES, get_profile


def parser() -> argparse.ArgumentParser:
    """The command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--profile", choices=PROFILES, default="mini",
                        help="smoke (minutes), mini (default) or paper (AudioCaps; your own paths by "
                             "DL_SETTINGS=my.toml, see README)")
    top = argparse.ArgumentParser(prog="python -m dl", description="Diffusion-Link, replicated.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{check,caption,demo,run,embed,fit}")

    check = commands.add_parser("check", parents=[shared],
                                help="environment, data, models, Java, device: OK or what to do, a line each")
    check.add_argument("--pins-only", action="store_true", help="only compare the versions with pyproject.toml")

    caption = commands.add_parser("caption", parents=[shared], allow_abbrev=False,
                                  help="captions of your own sound files, one for each 10 s")
    caption.add_argument("files", nargs="+", metavar="FILE",
                         help="any file that soundfile reads, of any length, rate and number of channels")
    caption.add_argument("--no-bridge", action="store_true",
                         help="feed the raw audio vectors to the captioner, to hear what the bridge does")
    caption.add_argument("--json", action="store_true", help="one JSON list: file, start_s, end_s, caption or error")

    demo = commands.add_parser("demo", parents=[shared], help="a page on 127.0.0.1: drop a sound, see and hear it, "
                                                              "read its captions (pip install -e \".[demo]\")")
    demo.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860")

    run = commands.add_parser("run", prog="./run_all.sh", help="run the notebooks that are not up to date",
                              parents=[shared],
                              description="Run every notebook that is not up to date. Also: ./run_all.sh test "
                                          "[--slow] runs the tests, ./run_all.sh check looks at the environment.")
    run.add_argument("--only", nargs="+", metavar="NN", help="run these stages alone, A1, A2 and A3 included")
    run.add_argument("--from", dest="start", metavar="NN", help="leave out the stages before NN")
    run.add_argument("--seeds", type=int, metavar="N", help="training seeds 0 .. N-1 in place of the profile's")
    run.add_argument("--full", action="store_true", help="the committed results: every seed, peer and ablation; hours")
    run.add_argument("-p", dest="extra", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                     help="another parameter of the notebooks, as papermill takes it: -p num_beams 1")
    run.add_argument("--force", action="store_true", help="run them even if nothing changed")
    run.add_argument("--dry-run", action="store_true", help="say RUN or SKIP for each stage, and why; run nothing")
    run.add_argument("--list", action="store_true", help="list the stages, what each reads and makes")

    several = "in several processes under accelerate launch"
    commands.add_parser("embed", parents=[shared], help=f"embed all clips and captions into the cache, {several}")
    fit = commands.add_parser("fit", parents=[shared], help=f"train one caption decoder into the cache, {several}")
    fit.add_argument("--decoder", default="text", metavar="NAME",
                     help="text (notebook 07; the default), raw or diffusion_link (notebook 08)")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="training seed (default 0)")
    return top


def literal(text: str) -> object:
    """A value as Python writes it (1, 0.5, True, None), else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def dashed(arguments: list[str]) -> list[str]:
    """Put ./ before each sound file whose name begins with a dash, as one YouTube id in 64 does."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = ("-h", "--help", "--json", "--no-bridge", "--profile")

    def named(text: str) -> str:
        sound = os.path.lexists(text) or Path(text).suffix.lower() in AUDIO_SUFFIXES
        return f"./{text}" if text.startswith("-") and text not in options and sound else text
    return [named(text) for text in arguments[:end]] + arguments[end:]


def answer(arguments: list[str]) -> int:
    """For ``run_all.sh`` before an install: 0 if there is something to run, else 100 + the answer's exit code."""
    try:
        options = parser().parse_args(arguments)
    except SystemExit as end:                                      # --help or a wrong option
        return 100 + int(end.code or 0)
    return 100 + main(arguments) if options.list else 0


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit code."""
    try:
        code = command(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:                                        # ... | head: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def command(arguments: list[str]) -> int:
    """What :func:`main` does, but for a closed pipe."""
    options = parser().parse_args(dashed(arguments) if arguments[:1] == ["caption"] else arguments)
    try:
        profile = get_profile(options.profile)
    except (FileNotFoundError, ValueError) as error:               # the file that DL_SETTINGS names, or no repository
        print(error, file=sys.stderr)
        return 2

    if options.command == "check":
        from dl.check import check

        return check(profile, options.pins_only)
    if options.command == "caption":
        from dl.caption_files import caption_files

        return caption_files(options.files, profile, not options.no_bridge, options.json)
    if options.command == "demo":
        from dl.caption_files import serve

        return serve(profile, options.port)
    if options.command in ("embed", "fit"):
        from dl.run import embed, fit

        try:
            return embed(profile) if options.command == "embed" else fit(profile, options.decoder, options.seed)
        except (FileNotFoundError, ValueError, RuntimeError) as error:       # each says what to do
            print(f"{options.command}: {error}", file=sys.stderr)
            return 1

    from dl.run import Run, list_stages, run_stages

    if options.seeds is not None and options.seeds < 1:
        print("run_all: --seeds takes a number of at least 1", file=sys.stderr)
        return 2
    asked = {name: value for name, value in (("full", options.full), ("seeds", options.seeds)) if value}
    run = Run(profile, asked=asked | {name: literal(value) for name, value in options.extra})
    if options.list:
        list_stages(run)
        return 0
    return run_stages(run, options.only, options.start, options.force, options.dry_run)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
