"""The `tutelage` command: parse, call, print. It refuses to hold any rule, and imports nothing heavy before it is needed."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from tutelage import __version__
from tutelage.errors import CycleRunning, InvalidRequest, TutelageError
from tutelage.records import Strategy
from tutelage.settings import Home

Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or failed with a message, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return status
    except TutelageError as error:
        print(f"tutelage: {error.message}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # whoever reads our output (`head`, a pager) has seen enough; what is still buffered must go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("tutelage: interrupted; everything that was started has been ended", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tutelage", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--version", action="version", version=f"tutelage {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _running(commands)
    _exporting(commands)
    _command(commands, "env", _env, 'shell exports: eval "$(tutelage env)"')

    _evaluations(commands)
    _measuring(commands)
    _listing(commands, "status", "tiers, students, gaps and spend", "status")
    _listing(commands, "students", "every version of every student", "students")
    _listing(commands, "promotions", "the promotion ledger", "promotions")
    _gaps(commands)
    lineage = _listing(commands, "lineage", "from an answer to the requests it was learned from", "lineage")
    lineage.add_argument("request_id", metavar="REQUEST_ID")
    usage = _listing(commands, "usage", "requests, tokens and cost by tenant, key, model, domain and day", "usage")
    usage.add_argument("--csv", action="store_true", help="as CSV, safe to open in a spreadsheet")
    _tenants(commands)
    _keys(commands)
    _policies(commands)
    _audit(commands)
    return parser


def _running(commands: Any) -> None:
    demo = _command(commands, "demo", _demo, "run the whole loop on real input and report")
    demo.add_argument("--traffic", nargs="+", type=Path, metavar="FILE", help='your own log, JSONL of {"prompt", "label", "domain"?}')
    demo.add_argument("--report", type=Path, default=None, metavar="FILE", help="write the report as JSON here, and as HTML beside it")
    demo.add_argument("--seed", type=int, default=7)
    demo.add_argument("--per-domain", type=int, default=None, metavar="N", help="requests of each domain before the cycle")
    demo.add_argument(
        "--day", action="store_true", help="a day of drifting traffic with cycles between its quarters, against the teacher alone"
    )
    demo.add_argument("--per-quarter", type=int, default=None, metavar="N", help="requests of each quarter of the day")
    demo.add_argument("--config", type=Path, default=None, metavar="DIR", help="configuration to start from (default: configs)")

    serve = _command(commands, "serve", _serve, "gateway, local tier, PostgreSQL and Valkey on this machine")
    serve.add_argument("--config", metavar="DIR", help="configuration folder (default: TUTELAGE_CONFIG, this home's config, or configs)")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8080)
    serve.add_argument("--workers", type=int, default=1)

    _command(commands, "stop", _stop, "end whatever a killed serve or demo left behind")
    _command(commands, "ui", _ui, "start (or find) and print the Prefect and MLflow UIs")
    evolve = _command(commands, "evolve", _evolve, "run an evolution cycle now")
    evolve.add_argument("--once", action="store_true", help="one cycle (the default)")
    evolve.add_argument("--tenant", metavar="NAME", help="only this tenant (default: all)")
    evolve.add_argument("--config", metavar="DIR")


def _exporting(commands: Any) -> None:
    export = _command(commands, "export", _export, "rows to train on elsewhere: a tenant's traffic, or a curated or distilled file")
    export.add_argument("out", type=Path, metavar="FILE")
    source = export.add_mutually_exclusive_group(required=True)
    source.add_argument("--tenant", metavar="NAME", help="its recorded answers, scrubbed; nothing of a tenant that opted out")
    source.add_argument("--data", type=Path, metavar="FILE", help="a JSONL of a student's folder")
    export.add_argument("--domain", metavar="NAME", help="only this domain of the tenant's")
    export.add_argument("--format", choices=("jsonl", "openai", "preference", "parquet"), default="jsonl")


def _gaps(commands: Any) -> None:
    gaps = _listing(commands, "gaps", "where the teacher is needed often and dearly, as of now", "gaps")
    gap_actions = gaps.add_subparsers(metavar="ACTION")
    spawn = _command(gap_actions, "spawn", _spawn, "train a student for a proposed gap now (evolve.yaml: auto_spawn_students)")
    spawn.add_argument("domain", nargs="+", metavar="DOMAIN")
    spawn.add_argument("--tenant", metavar="NAME", required=True)
    spawn.add_argument("--config", metavar="DIR")


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], Any], help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text)
    parser.add_argument("--home", metavar="DIR", help="state folder (default: TUTELAGE_HOME or .tutelage)")
    parser.set_defaults(run=run)
    return parser


def _listing(commands: Any, name: str, help_text: str, operation: str) -> argparse.ArgumentParser:
    parser = _command(commands, name, _operate, help_text)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(operation=operation)
    return parser


def _evaluations(commands: Any) -> None:
    replay = _command(commands, "replay", _replay, "route recorded traffic offline; the page goes beside the report")
    replay.add_argument("log", nargs="+", type=Path, metavar="LOG", help='JSONL of {"prompt", "domain"?, "scores", "cost_usd"?}')
    replay.add_argument("--fit", type=Path, metavar="TRAIN", help="log to learn from (default: 5-fold cross-fitting on LOG)")
    replay.add_argument("--policy", metavar="NAME", help="the default policy: expected, quality or budget")
    replay.add_argument("--promise", type=float, default=0.05, metavar="LOSS", help="quality that `quality` may lose (default 0.05: 5 %%)")
    replay.add_argument(
        "--max-cost", type=float, metavar="X", help="mean cost of a request under `budget`, in US dollars or share of strong"
    )
    domain_eval = _command(commands, "domain-eval", _domain_eval, "how well domains are recognised, and found without labels")
    domain_eval.add_argument("--fit", type=Path, required=True, metavar="FILE", help='JSONL of {"prompt", "domain", "intent"?}')
    domain_eval.add_argument("--data", type=Path, required=True, metavar="FILE", help="rows to judge")
    domain_eval.add_argument("--oos", type=Path, metavar="FILE", help="rows that belong to no domain")
    for parser in (replay, domain_eval):
        parser.add_argument("--report", type=Path, required=True, metavar="FILE")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _measuring(commands: Any) -> None:
    cache = _command(commands, "cache-eval", _cache_eval, "the semantic cache's verifier on labelled data, beside a bare cosine")
    cache.add_argument(
        "--pairs", type=Path, required=True, metavar="FILE", help='JSONL of {"text_a", "text_b", "label"} or {"origin", "similar"}'
    )
    cache.add_argument("--fit", type=Path, metavar="FILE", help="labelled pairs to learn from (default: nothing is learned)")
    cache.add_argument(
        "--halves", type=int, default=0, metavar="N", help="also fit on a random half of the pairs and measure the other, N times"
    )
    cache.add_argument("--report", type=Path, required=True, metavar="FILE", help="write it as JSON here, and its plot as SVG beside it")
    cache.add_argument("--seed", type=int, default=0)
    simulate = _command(commands, "simulate", _simulate, "measure the error rates of promotion and rollback on students of known truth")
    simulate.add_argument("--seed", type=int, default=0)
    simulate.add_argument("--runs", type=int, default=2000, metavar="N", help="simulated students for each question (default 2000)")
    simulate.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON here, and a picture beside it")
    simulate.add_argument("--config", metavar="DIR")


def _tenants(commands: Any) -> None:
    parser = commands.add_parser("tenants", help="create, list, suspend, limit and delete tenants")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    create = _command(actions, "create", _operate, "create a tenant and its first key, shown once")
    create.add_argument("name")
    create.add_argument("--tier", choices=("free", "pro", "enterprise"), default="free")
    create.add_argument("--json", action="store_true")
    create.set_defaults(operation="create_tenant")
    for verb, status, help_text in (
        ("suspend", "suspended", "refuse a tenant's requests; its data is kept"),
        ("resume", "active", "let a suspended tenant go on"),
        ("change", None, "another tier, other limits, what is kept and how long, another way with clients that leave"),
    ):
        action = _command(actions, verb, _operate, help_text)
        action.add_argument("name")
        if status is None:
            action.add_argument("--tier", choices=("free", "pro", "enterprise"))
            action.add_argument("--limit", action="append", metavar="NAME=N", help="such as queries_per_day=2000 or concurrent=none")
            action.add_argument("--on-disconnect", choices=("cancel", "drain"), help="what becomes of a stream whose client leaves")
            action.add_argument("--bodies", choices=("off", "redacted", "full"), help="what is kept of prompts and answers")
            action.add_argument("--cache-seconds", metavar="N", help="how long answers may be given again; 0: not at all")
            action.add_argument(
                "--semantic-error-budget", metavar="SHARE", help="of answers given to paraphrases that may be wrong; 0: none are given"
            )
            action.add_argument("--strategy", choices=get_args(Strategy), help="how its requests are answered")
            action.add_argument("--max-cost-usd", metavar="X", help="what one answer may cost at most; none: whatever it costs")
            action.add_argument("--min-confidence", metavar="X", help="least quality that its answers are promised; none: none is stated")
            action.add_argument("--training", choices=("on", "off"), help="whether students may learn from its traffic")
            action.add_argument("--retention-days", metavar="N", help="erase them after so many days; none: keep them")
        action.add_argument("--json", action="store_true")
        action.set_defaults(operation="change_tenant", **({"tier": None, "limit": None, "on_disconnect": None} if status else {}))
        action.set_defaults(status=status)
    delete = _command(actions, "delete", _operate, "end a tenant's keys and erase its prompts and answers; bill and audit stay")
    delete.add_argument("name")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    delete.add_argument("--json", action="store_true")
    delete.set_defaults(operation="delete_tenant", confirm="ends all keys of {name} and erases its prompts and answers, for good")
    erase = _command(actions, "erase", _operate, "erase a tenant's texts, also from training files; quarantine what learned from them")
    erase.add_argument("name")
    erase.add_argument("--yes", action="store_true", help="do not ask")
    erase.add_argument("--json", action="store_true")
    erase.set_defaults(operation="erase_tenant", confirm="erases all texts of {name} and takes every student that learned from them away")
    _listing(actions, "list", "list tenants", "tenants")


def _keys(commands: Any) -> None:
    parser = commands.add_parser("keys", help="create, rotate, revoke and list keys")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    create = _command(actions, "create", _operate, "a new key of a tenant, or of an operator; shown once")
    create.add_argument("tenant", nargs="?")
    create.add_argument("--operator", choices=("admin", "billing", "viewer"), metavar="ROLE")
    create.add_argument("--role", choices=("admin", "billing", "viewer"), help="lets a tenant's key administer its own tenant")
    create.add_argument("--models", nargs="+", metavar="NAME", help="the only models it may name, such as auto")
    create.add_argument("--routes", nargs="*", metavar="ROUTE", help="the only routes it may use: chat, embeddings, feedback, models")
    create.add_argument("--expires", metavar="TIME", help="such as 12h or 90d (default: never)")
    create.add_argument("--limit", action="append", metavar="NAME=N", help="its own limit within the tenant's, such as concurrent=2")
    create.set_defaults(operation="create_key")
    rotate = _command(actions, "rotate", _operate, "a new key beside an old one, which ends after the overlap")
    rotate.add_argument("key_id")
    rotate.add_argument("--overlap", default="1h", metavar="TIME", help="such as 90s, 30m, 1h, 2d")
    rotate.set_defaults(operation="rotate_key")
    revoke = _command(actions, "revoke", _operate, "end a key now")
    revoke.add_argument("key_id")
    revoke.set_defaults(operation="revoke_key")
    for action in (create, rotate, revoke):
        action.add_argument("--json", action="store_true")
    _listing(actions, "list", "list keys, never their secrets", "keys")


def _policies(commands: Any) -> None:
    parser = commands.add_parser("policies", help="what routing goes by, for each tenant: list, show, tune and revert its versions")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = _listing(actions, "list", "every version of every tenant's policy, newest first", "policies")
    listing.add_argument("tenant", nargs="?", metavar="TENANT", help="only this tenant's (default: all)")
    show = _listing(actions, "show", "one version with its reason and evidence", "policy")
    tune = _listing(actions, "tune", "what the recorded requests say of threshold and similarity", "tune_policy")
    tune.add_argument("--config", metavar="DIR", help="configuration folder (default: TUTELAGE_CONFIG, this home's config, or configs)")
    tune.add_argument("--apply", action="store_true", help="make what is proposed the next version")
    revert = _listing(actions, "revert", "route again as an older version says", "revert_policy")
    for action in (show, tune, revert):
        action.add_argument("tenant", metavar="TENANT")
    show.add_argument("version", nargs="?", type=int, metavar="VERSION", help="default: the one that holds")
    revert.add_argument("version", type=int, metavar="VERSION", help="0: as configured")
    revert.add_argument("--reason", required=True)


def _audit(commands: Any) -> None:
    parser = commands.add_parser("audit", help="check, read and export the audit chains; erase prompts and answers")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    verify = _listing(actions, "verify", "check every chain; exit 1 and say where at the first break", "verify_audit")
    verify.add_argument("--tenant", metavar="NAME", help="only this tenant's chain (default: all)")
    verify.add_argument("--heads", metavar="FILE", help="signed heads kept elsewhere (default: this home's audit/heads.jsonl)")
    listing = _listing(actions, "list", "the newest links of a chain, newest first", "list_audit")
    listing.add_argument("tenant", nargs="?", metavar="TENANT", help="default: the installation's own chain")
    listing.add_argument("--limit", type=int, default=50, metavar="N")
    export = _listing(actions, "export", "write chains as JSON lines, and sign their heads", "export_audit")
    export.add_argument("file", metavar="FILE")
    export.add_argument("--tenant", metavar="NAME", help="only this tenant's chain (default: all)")
    erase = _listing(actions, "erase", "erase a tenant's prompts and answers; the bill and the chain stay and hold", "erase")
    erase.add_argument("tenant", metavar="TENANT")
    erase.add_argument("--request", metavar="ID", help="only of this request")
    erase.add_argument("--before", metavar="DAY", help="only of requests before this day (UTC), such as 2026-11-01")
    erase.add_argument("--all", action="store_true")


# --- commands --------------------------------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> None:
    from tutelage.fleet import processes
    from tutelage.fleet.local import Local
    from tutelage.telemetry import log_to_stderr

    log_to_stderr(plain=True)
    processes.on_terminate_raise()
    home = Home.from_environment(arguments.home)
    config = home.config_dir(arguments.config)
    local = Local(home, config_dir=config, host=arguments.host, port=arguments.port, workers=arguments.workers, say=_say, unattended=True)
    with local:
        _say(f"serving {local.url}/v1 with {config}; state in {home.root}; stop with Ctrl-C")
        local.watch()


def _demo(arguments: argparse.Namespace) -> int:
    from tutelage.demo.day import demo_day
    from tutelage.demo.run import demo
    from tutelage.fleet import processes

    processes.on_terminate_raise()
    home = Home.from_environment(arguments.home)
    given = {"traffic": arguments.traffic, "report": arguments.report, "seed": arguments.seed, "config": arguments.config}
    if arguments.day:
        return demo_day(home, per_quarter=arguments.per_quarter, **given)
    return demo(home, per_domain=arguments.per_domain, **given)


def _replay(arguments: argparse.Namespace) -> None:
    from tutelage.evaluations import command

    report = command.replay(Home.from_environment(arguments.home), arguments)
    if arguments.json:
        print(json.dumps(report))
    else:
        _table(command.table(report))
        _say(f"default policy {report['default']}; report in {arguments.report}, page in {arguments.report.with_suffix('.html')}")


def _domain_eval(arguments: argparse.Namespace) -> None:
    from tutelage.evaluations import command

    report = command.domain_eval(Home.from_environment(arguments.home), arguments)
    if arguments.json:
        print(json.dumps(report))
    else:
        low, high = report.pop("wilson95")
        _describe(report | {"interval95": f"{low:.4f}–{high:.4f}"})


def _stop(arguments: argparse.Namespace) -> None:
    from tutelage.fleet.local import stop_all

    home = Home.from_environment(arguments.home)
    ended = stop_all(home)
    _say(f"ended {', '.join(ended)}" if ended else f"nothing of {home.root} is running")


def _ui(arguments: argparse.Namespace) -> None:
    from tutelage.fleet.consoles import start

    home = Home.from_environment(arguments.home)
    for name, url in start(home, config_dir=home.config_dir()).items():
        print(f"{name:8} {url}")


def _evolve(arguments: argparse.Namespace) -> int:
    home = Home.from_environment(arguments.home)
    return _cycle(home, home.config_dir(arguments.config), ["--tenant", arguments.tenant] if arguments.tenant else [])


def _spawn(arguments: argparse.Namespace) -> int:
    from tutelage import operations

    home = Home.from_environment(arguments.home)
    operations.run(home, "check_proposed", arguments)
    return _cycle(home, home.config_dir(arguments.config), ["--tenant", arguments.tenant, "--spawn", *arguments.domain])


def _cycle(home: Home, config: Path, options: Sequence[str]) -> int:
    """A cycle by hand, to its end."""
    from tutelage.fleet import consoles, processes

    if processes.find(home, "evolve"):
        raise CycleRunning("a cycle that was begun by hand is running; wait for it to end")
    processes.on_terminate_raise()
    # a Prefect server that `tutelage ui` started sees the run as it goes; without one, Prefect starts its own for the run
    prefect = consoles.running(home, "prefect")
    environment = {"PREFECT_API_URL": f"{prefect}/api"} if prefect else {}
    command = processes.python("-m", "flows.evolve", "--config", str(config), *options)
    return processes.run_attached(home, "evolve", command, environment=environment)


def _cache_eval(arguments: argparse.Namespace) -> None:
    from tutelage import cache_eval

    told = cache_eval.run(
        Home.from_environment(arguments.home),
        data=arguments.pairs, fit=arguments.fit, report=arguments.report, halves=arguments.halves, seed=arguments.seed,
    )  # fmt: skip
    for line in cache_eval.lines(told):
        print(line)
    _say(f"report: {arguments.report}, plot: {arguments.report.with_suffix('.svg')}")


def _simulate(arguments: argparse.Namespace) -> None:
    from tutelage.simulation.command import simulate

    config = Home.from_environment(arguments.home).config_dir(arguments.config)
    simulate(config, seed=arguments.seed, runs=arguments.runs, report=arguments.report)


def _export(arguments: argparse.Namespace) -> int:
    import tempfile

    from tutelage import operations
    from tutelage.fleet import processes

    home = Home.from_environment(arguments.home)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tenant:
            arguments.data = Path(folder) / "interactions.jsonl"
            operations.run(home, "lessons", arguments)
        command = processes.python("-m", "training.export", "--data", str(arguments.data.resolve()), "--out", str(arguments.out.resolve()))
        return processes.run_attached(home, "export", [*command, "--format", arguments.format])


def _env(arguments: argparse.Namespace) -> None:
    for name, value in Home.from_environment(arguments.home).environment().items():
        print(f"export {name}={shlex.quote(value)}")


def _operate(arguments: argparse.Namespace) -> None:
    from tutelage import operations

    home = Home.from_environment(arguments.home)
    if getattr(arguments, "confirm", None) and not arguments.yes and sys.stdin.isatty():
        _say(f"this {arguments.confirm.format(name=arguments.name)}; repeat the name to go on:")
        if input("> ") != arguments.name:
            raise InvalidRequest("nothing was done")
    result = operations.run(home, arguments.operation, arguments)
    if arguments.json:
        print(json.dumps(result, default=str))
    elif getattr(arguments, "csv", False) and isinstance(result, list):
        print("".join(_as_csv(result)), end="")
    elif isinstance(result, list):
        _table(result)
    else:
        _describe(result)


# --- printing --------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(f"tutelage: {text}", flush=True)


def _table(rows: Rows) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        _say("nothing yet")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _as_csv(rows: Rows) -> Iterator[str]:
    from tutelage import sheets
    from tutelage.stores.usage import Question

    columns = Question().columns
    yield sheets.header(columns)
    for row in rows:
        yield sheets.line([row[column] for column in columns])


def _describe(record: dict[str, Any]) -> None:
    for name, value in record.items():
        if isinstance(value, list):
            print(f"\n{name}")
            _table(value)
        else:
            print(f"{name:12} {_cell(value)}")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
