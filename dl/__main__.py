"""``python -m dl`` with check, caption, demo, run (what ``./run_all.sh`` calls), embed and fit (for ``accelerate launch``)."""
from __future__ import annotations

import argparse
import ast
import sys

from dl.config import PROFILES, get_profile


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m dl", description="Diffusion-Link, replicated.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{check,caption,demo,run,embed,fit}")

    check = commands.add_parser("check", help="environment, data, models, Java, device: OK or what to do, a line each")
    check.add_argument("--profile", choices=PROFILES, default="mini")
    check.add_argument("--pins-only", action="store_true", help="only compare the installed versions with pyproject.toml")

    caption = commands.add_parser("caption", help="captions of your own sound files, one for each 10 s")
    caption.add_argument("files", nargs="+", metavar="FILE", help="any file that soundfile reads, of any length, rate and number of channels")
    caption.add_argument("--no-bridge", action="store_true", help="feed the raw audio vectors to the captioner, to hear what the bridge does")
    caption.add_argument("--json", action="store_true", help="one JSON list: file, start_s, end_s, caption; file, error")
    caption.add_argument("--profile", choices=PROFILES, default="mini", help="whose checkpoints are used")

    demo = commands.add_parser("demo", help="a page on 127.0.0.1: drop a sound, see and hear it, read its captions (pip install -e \".[demo]\")")
    demo.add_argument("--port", type=int, default=7860, metavar="N", help="default 7860")
    demo.add_argument("--profile", choices=PROFILES, default="mini", help="whose checkpoints are used")

    run = commands.add_parser("run", prog="./run_all.sh", help="run the notebooks that are not up to date",
                              description="Run every notebook that is not up to date. Also: ./run_all.sh test [--slow] runs the tests, "
                                          "./run_all.sh check looks at the environment.")
    run.add_argument("--profile", choices=PROFILES, default="mini", help="smoke (minutes), mini (default) or paper (AudioCaps; your own paths by DL_SETTINGS=my.toml, see README)")
    run.add_argument("--only", nargs="+", metavar="NN", help="run these stages alone, A1, A2 and A3 included")
    run.add_argument("--from", dest="start", metavar="NN", help="leave out the stages before NN")
    run.add_argument("--seeds", type=int, metavar="N", help="training seeds 0 .. N-1 in place of the profile's")
    run.add_argument("--full", action="store_true", help="the committed results: every seed, peer and ablation; hours")
    run.add_argument("-p", dest="extra", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                     help="another parameter of the notebooks, as papermill takes it: -p num_beams 1")
    run.add_argument("--force", action="store_true", help="run them even if nothing changed")
    run.add_argument("--dry-run", action="store_true", help="say RUN or SKIP for each stage, with the reason, and run nothing")
    run.add_argument("--list", action="store_true", help="list the stages, what each reads and makes")

    embed = commands.add_parser("embed", help="embed all clips and captions into the cache, in several processes under accelerate launch")
    embed.add_argument("--profile", choices=PROFILES, default="mini")

    fit = commands.add_parser("fit", help="train one caption decoder into the cache, in several processes under accelerate launch")
    fit.add_argument("--profile", choices=PROFILES, default="mini")
    fit.add_argument("--decoder", default="text", metavar="NAME", help="text (notebook 07; the default), raw or diffusion_link (notebook 08)")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help="training seed (default 0)")
    return top


def literal(text: str) -> object:
    """A value as Python writes it (1, 0.5, True, None), else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        profile = get_profile(options.profile)
    except (FileNotFoundError, ValueError) as error:               # the file that DL_SETTINGS names
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
        except (FileNotFoundError, ValueError, RuntimeError) as error:       # each says what to do; lacking memory is a RuntimeError
            print(f"{options.command}: {error}", file=sys.stderr)
            return 1

    from dl.run import STAGES, Run, list_stages, run_stages

    if options.seeds is not None and options.seeds < 1:
        print("run_all: --seeds takes a number of at least 1", file=sys.stderr)
        return 2
    run = Run(profile, STAGES, full=options.full, seeds=options.seeds, extra={name: literal(value) for name, value in options.extra})
    if options.list:
        list_stages(run)
        return 0
    return run_stages(run, options.only, options.start, options.force, options.dry_run)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
