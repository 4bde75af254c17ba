"""What every command has in common: numbers, places and names from outside, and what a stream can
hold.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from helpers import save_tiny
from typer.testing import CliRunner

import lowbit
from lowbit.artifact.proof import Verification
from lowbit.cli import app
from lowbit.cli.display import comparison_table, summary
from lowbit.console import Console, Table
from lowbit.errors import LowbitError
from lowbit.evaluate import continue_text
from lowbit.evaluate.pages import write_comparison
from lowbit.machine import pick_device
from lowbit.names import hub_id, model_name
from lowbit.recipe.presets import load_recipe, recipe_names
from lowbit.run.asked import Result
from lowbit.verbatim import code, code_block, literal, markdown, plotted, shell

COMMANDS = {
    c.name or c.callback.__name__: inspect.signature(c.callback, eval_str=True).parameters
    for c in app.registered_commands
}
NEEDED = {
    "model": "none",
    "folder": "none",
    "repo": "o/n",
    "output": "out",
    "prompt": "x",
    "schemes": "W4A16",
    "recipes": "rtn",
}
ODD = ["x[/tmp]y", "[red]a[/red]", "[bold", ":smile:", "a b'c", "$HOME `x` \\n", "üñ 你"]


def call(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, result.output


def refusal(*args: object) -> str:
    """The one sentence that a command line is refused with."""
    status, said = call(*args)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def words_of(param: inspect.Parameter) -> list[str]:
    """An option as it is written, short forms first; empty for an argument."""
    info = param.annotation.__metadata__[0]
    if not isinstance(info, typer.models.OptionInfo):
        return []
    return list(info.param_decls or ["--" + param.name.replace("_", "-")])


def needed(command: str, without: str = "") -> list[str]:
    """Arguments that a command cannot do without, about things that are not there: it stops at them
    if it gets so far.
    """
    words = []
    for name, param in COMMANDS[command].items():
        if param.default is inspect.Parameter.empty and name != without:
            words += [*words_of(param)[:1], NEEDED[name]]
    return words


def options(kind: type) -> list[tuple[str, str]]:
    """Every (command, option) whose value is of a type, or of that type or None."""
    found = []
    for command, params in COMMANDS.items():
        for param in params.values():
            held = param.annotation.__args__[0]
            if kind in (held, *getattr(held, "__args__", ())):
                found.append((command, words_of(param)[-1]))
    return found


NUMBERS = {
    int: ["-1", "100000000000000000000", "9" * 5000, "nan", "1.5", "x"],
    float: ["-1", "nan", "inf", "-inf", "1e300", "1e-300", "x"],
}


@pytest.mark.parametrize(
    ("command", "option", "kind"), [(*o, kind) for kind in NUMBERS for o in options(kind)]
)
def test_every_number_of_every_command_is_checked_before_anything_else(
    command: str, option: str, kind: type, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = NUMBERS[kind]
    if option not in ("--shots", "--seed", "--temperature"):
        values = [*values, "0"]
    for value in values:
        assert option in refusal(command, *needed(command), option, value), value
    assert not any(tmp_path.iterdir())


def test_there_are_numbers_to_check() -> None:
    assert {
        ("generate", "--tokens"),
        ("quantize", "--seed"),
        ("plan", "--gpu-memory"),
        ("analyze", "--batch"),
    } <= {*options(int), *options(float)}


@pytest.mark.parametrize(
    "option",
    [
        "awq.exponents",
        "awq.shrinks",
        "awq.rows",
        "awq.clip_tokens",
        "tesseraq.lr",
        "tesseraq.iters",
        "calibration.samples",
    ],
)
@pytest.mark.parametrize(
    "value",
    ["-1", "100000000000000000000", "1" + "0" * 400, "9" * 5000, "nan", "inf", "-inf", "1e300"],
)
def test_numbers_of_a_recipe(option: str, value: str) -> None:
    with pytest.raises(LowbitError, match=option.partition(".")[0]):
        load_recipe(
            "awq" if option.startswith("awq") else "tesseraq", settings=[f"{option}={value}"]
        )


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        ("awq", "awq.exponents=0"),
        ("awq", "awq.shrinks=0"),
        ("awq", "awq.rows=0"),
        ("tesseraq", "tesseraq.schedule=exponential-5-99999999999"),
        ("tesseraq", "tesseraq.schedule=exponential-inf-5"),
        ("omniquant", "omniquant.clip_lr=inf"),
        ("gptq", "gptq.damping=1e300"),
        ("claq", "claq.threshold=inf"),
        ("crossquant", "activations.row_exponent=nan"),
    ],
)
def test_numbers_of_a_recipe_that_only_one_method_knows(recipe: str, setting: str) -> None:
    with pytest.raises(LowbitError):
        load_recipe(recipe, settings=[setting])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[awq]\nrows = " + "9" * 5000, "not valid TOML"),
        ("x = " + "[" * 5000, "not valid TOML"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_recipe_files_that_python_gives_up_on(tmp_path, text: str | bytes, says: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LowbitError, match=says):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("tokens", "temperature"),
    [(0, 0.0), (-3, 0.0), (1, -1.0), (1, float("nan")), (1, float("inf"))],
)
def test_generation_of_nothing_is_refused(tokens: int, temperature: float) -> None:
    with pytest.raises(LowbitError, match="at least 1 token"):
        continue_text(None, None, "x", tokens, temperature)


def test_a_plan_for_rows_beyond_the_context(tmp_path) -> None:
    model = save_tiny(tmp_path / "m")
    assert "beyond the model's context of 128" in refusal(
        "plan", model, "--scheme", "W4A16g32", "--recipe", "rtn", "--length", "129"
    )


def test_plan_and_quantize_refuse_alike_what_only_this_library_loads(tmp_path) -> None:
    options = (save_tiny(tmp_path / "m"), "--scheme", "W4A4KV4", "--recipe", "quarot+gptq")
    assert call("plan", *options)[0] == 0
    planned = refusal("plan", *options, "--plain")
    assert "leave --plain out" in planned
    assert refusal("quantize", *options, "--plain", "-o", tmp_path / "out") == planned
    assert not (tmp_path / "out").exists()


def test_a_device_without_numbers() -> None:
    with pytest.raises(LowbitError, match="device 'meta' is not available"):
        pick_device("meta")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nosuch"], "no such command 'nosuch'"),
        (["eval"], "missing argument"),
        (["eval", "m", "--lenth", "3"], "no such option"),
        (["generate", "m"], "--prompt"),
        (["quantize", "m", "-o", "x", "--seed", "1e3"], "--seed"),
    ],
)
def test_usage_is_one_sentence_too(args: list[str], says: str) -> None:
    said = refusal(*args)
    assert says in said and "--help' lists what can be given" in said


def test_no_command_shows_the_help() -> None:
    status, said = call()
    assert status == 2 and "Commands:" in said and "error" not in said


# --- places ---------------------------------------------------------------------------------------

# The folders that commands fill: test_place.py.
JSON = [("eval", "--json"), ("plan", "--json")]
FOLDERS = [("plan", "--offload-dir")]


@pytest.mark.parametrize(("command", "option"), JSON + FOLDERS)
@pytest.mark.parametrize("place", ["file/x/r", "n" * 300, "/proc/nothing/r"])
def test_a_place_that_cannot_be_written_is_found_out_first(
    tmp_path, monkeypatch, command: str, option: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert "cannot be written" in refusal(
        command, *needed(command, without="output"), option, place
    )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("command", "option", "place"),
    [
        *((*o, "folder") for o in JSON),
        *((*o, "/dev/null") for o in JSON),
        *((*o, "file") for o in FOLDERS),
    ],
)
def test_a_place_of_another_kind(
    tmp_path, monkeypatch, command: str, option: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("")
    assert f"'{place}' is not a " in refusal(
        command, *needed(command, without="output"), option, place
    )


def test_json_goes_into_a_folder_that_is_made(tmp_path) -> None:
    model = save_tiny(tmp_path / "m")
    args = [model, "--text", model / "text.txt", "--length", "32", "--windows", "1"]
    assert "vocabulary" in refusal(
        "eval",
        *args,
        "--reference",
        other_vocabulary(tmp_path),
        "--json",
        tmp_path / "a" / "b" / "r.json",
    )
    assert not (tmp_path / "a").exists()  # trying it left nothing
    assert call("eval", *args, "--json", tmp_path / "a" / "b" / "r.json")[0] == 0
    assert json.loads((tmp_path / "a" / "b" / "r.json").read_text())["windows"] == 1


def other_vocabulary(folder: Path) -> Path:
    import transformers as T
    from helpers import LLAMA, tiny_tokenizer

    T.LlamaForCausalLM(T.LlamaConfig(**{**LLAMA, "vocab_size": 310})).save_pretrained(
        folder / "other"
    )
    tiny_tokenizer().save_pretrained(folder / "other")
    return folder / "other"


def test_what_the_file_system_refuses_later_is_a_sentence(tmp_path, monkeypatch) -> None:
    model = save_tiny(tmp_path / "m")
    out = tmp_path / "out"
    (out / "analysis.html").mkdir(parents=True)
    status, said = call(
        "analyze",
        model,
        "--text",
        model / "text.txt",
        "--length",
        "32",
        "--windows",
        "1",
        "--no-remove",
        "-o",
        out,
    )
    assert status == 2 and f"error: cannot write '{out / 'analysis.html'}': Is a directory." in said
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError(28, "No space left on device"),
            "error: the system cannot read or write something: No space left on device. Mend that",
        ),
        (OSError(5, "Input/output error"), "something: Input/output error. "),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp',\n'/']"),
            "No usable temporary directory found in ['/tmp', '/']. ",
        ),
        (ConnectionError("cannot reach the hub."), "error: cannot reach the hub.\n"),
        (TimeoutError(), "error: TimeoutError.\n"),
        (
            PermissionError(13, "Permission denied", "a"),
            "error: 'a' cannot be read or written: Permission denied.\n",
        ),
    ],
)
def test_what_the_system_refuses_is_a_sentence_without_a_path_too(
    monkeypatch, error: OSError, says: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("lowbit.artifact.proof.read_report", refuse)
    assert says in refusal("inspect", "x")


def test_a_reader_that_is_gone_is_no_error(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("lowbit.artifact.proof.read_report", refuse)
    status, said = call("inspect", "x")
    assert status == 1 and "error" not in said


# --- what the help says of recipes ----------------------------------------------------------------


@pytest.mark.parametrize(("option", "usual"), [("samples", 128), ("calib", "stdlib")])
def test_the_help_names_the_recipes_that_have_another_default(option: str, usual: object) -> None:
    """By words in their names, which are quoted: every recipe with one of them, and no other."""
    said = COMMANDS["quantize"][option].annotation.__metadata__[0].help.partition("Default: ")[2]
    words = re.findall("'([^']+)'", said.replace("recipe's", "recipe"))
    found = {
        n: (c.samples if option == "samples" else c.source)
        for n in recipe_names()
        for c in [load_recipe(n).calibration]
    }
    assert {n for n, v in found.items() if v != usual} == {
        n for n in found if any(w in n for w in words)
    }
    assert all(str(v) in said for v in found.values())
    assert load_recipe("best").calibration.samples == 512
    assert load_recipe("best").calibration.source == "stdlib"


# --- names from outside ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
def test_a_console_prints_what_it_is_given(name: str) -> None:
    file = io.StringIO()
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    for what in (name, table):
        Console(file=file).print(what)
    assert file.getvalue().count(name) == 5


CONTROLS = "a\tb  c\r\nd\x0ce\x08f\rg\x07\x1b[31mh\x9b2Jü\x7f"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_reach_a_file_and_drive_no_terminal() -> None:
    file, terminal, piped = io.StringIO(), Terminal(), io.StringIO()
    consoles = (
        Console(file=file),
        Console(file=terminal, force_terminal=False),
        Console(file=piped, force_terminal=True),
    )
    for console in consoles:
        console.print(CONTROLS, "2", style="red")
        console.print()
        console.print("x", end="")
    shown = "a\tb  c\r\nd\\x0ce\\x08f\\rg\\x07\\x1b[31mh\\x9b2Jü\\x7f 2\n\nx"
    assert file.getvalue() == f"{CONTROLS} 2\n\nx" and terminal.getvalue() == shown
    assert re.sub(r"\x1b\[3?[01]m", "", piped.getvalue()) == shown
    assert piped.getvalue().startswith("\x1b[31ma\tb  c\r")


def test_control_characters_in_a_table_are_seen() -> None:
    for file in (io.StringIO(), Terminal()):
        table = Table(CONTROLS, title=CONTROLS, caption=CONTROLS)
        table.add_row(CONTROLS)
        Console(file=file, width=200).print(table)
        assert file.getvalue().count("d\\x0ce\\x08f\\rg\\x07\\x1b[31mh\\x9b2Jü\\x7f") == 4
        assert file.getvalue().count("a\\tb  c\\r") == 4
        assert "[31mh" not in re.sub(r"\\x1b\[31mh", "", file.getvalue())


def test_strings_come_out_above_a_live_table() -> None:
    from rich.live import Live

    file = Terminal()
    console = Console(file=file, force_terminal=True, _environ={"TERM": "xterm"})
    with Live(Table("shown"), console=console, auto_refresh=False) as live:
        console.print("a\tb\r", style="red")
        live.update(Table("again"), refresh=True)
    said = file.getvalue()
    assert "\x1b[31ma\tb\\r\x1b[0m\n" in said and said.index("a\tb") < said.rindex("again")
    # Drawn again below the string.
    assert "shown" in said[: said.index("a\tb")] and "shown" in said[said.index("a\tb") :]


def test_only_the_console_of_the_library_is_used() -> None:
    root = Path(lowbit.__file__).parent
    found = {
        p.name
        for p in root.rglob("*.py")
        if re.search(
            r"rich(\.console|\.table)? import .*(Console|Table)|from_markup|\bprint\(.*markup",
            p.read_text(),
        )
    }
    assert found <= {"console.py"} and "console" in (root / "cli" / "app.py").read_text()


def test_a_table_in_a_file_is_whole_and_on_a_terminal_folded(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [{"scheme": "W4", "recipe": "r" * 200, "error": "e"}]
    file = io.StringIO()
    Console(file=file).print(comparison_table(rows, "t" * 300))
    assert "r" * 200 in file.getvalue()
    assert "t" * 300 in file.getvalue()
    assert "…" not in file.getvalue()

    narrow = Terminal()
    Console(file=narrow, force_terminal=True, no_color=True).print(comparison_table(rows, ""))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", narrow.getvalue())
    assert shown.count("r") >= 200 and max(map(len, shown.splitlines())) <= 40


@pytest.mark.parametrize("name", [ODD[0], ODD[2], ODD[4]])
def test_a_folder_of_any_name_goes_from_quantize_to_export(
    tmp_path, monkeypatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model, out = save_tiny(tmp_path / name / "m"), Path(name) / "out"
    status, said = call(
        "quantize",
        Path(name) / "m",
        "--scheme",
        "W4A16g32",
        "--recipe",
        "rtn",
        "--calib",
        model / "text.txt",
        "--samples",
        2,
        "--length",
        32,
        "-o",
        out,
    )
    assert status == 0 and f"report in {out}/report.json" in said, said
    evaluate, check = (
        shlex.split(line)[1:]
        for line in said.splitlines()
        if line.startswith(("evaluate ", "check "))
    )
    assert evaluate[2] == str(out)
    assert evaluate[-1] == f"{name}/m"
    assert check == ["lowbit", "verify", str(out)]
    status, said = call(*check[1:], "--no-loader")
    assert status == 0 and "verified" in said
    status, said = call("inspect", out)
    assert status == 0
    assert f"from {name}/m, seed 0" in said
    assert "model.layers.1.self_attn.q_proj" in said
    status, said = call("export", out, "-o", Path(name) / "e", "--to", "gptq_v2")
    assert status == 0 and said.startswith(f"{name}/e\n")
    assert shlex.quote(f"{name}/m") in (Path(name) / "e" / "README.md").read_text(encoding="utf-8")
    (out / "config.json").write_text("{}")
    status, said = call("verify", out, "--no-loader")
    assert status == 1 and f"'{out}/config.json' is not what was written" in said
    assert f"'{name}/gone'" in refusal("verify", f"{name}/gone")


def test_what_to_type_next_survives_a_shell() -> None:
    report = {
        "size": {"before": 1, "after": 1, "bits_per_weight": 1, "model_bits_per_weight": 1},
        "quality": None,
        "hash": "h" * 16,
        "seconds": 1.0,
        "format": "lowbit",
        "model": "-m $(x)",
        "recipe": {"scheme": "W4A16"},
    }
    said = summary(Result(Path('-a "b'), report, Verification(1, 1, "passed")))
    line = next(x for x in said.splitlines() if x.startswith("evaluate"))
    assert shlex.split(line)[1:] == [
        "lowbit",
        "eval",
        './-a "b',
        "--text",
        "stdlib",
        "--reference",
        "./-m $(x)",
    ]
    assert 'from_pretrained("-a \\"b")' in said


@pytest.mark.parametrize(
    ("how", "given", "wanted"),
    [
        (markdown, "a[b](c) *d* <e> `f` g_h _i_", r"a\[b\](c) \*d\* \<e\> \`f\` g_h \_i\_"),
        (markdown, "tiny-model_2.5 x", "tiny-model_2.5 x"),
        (code, "a", "`a`"),
        (code, "a`b", "``a`b``"),
        (code, "`a", "`` `a ``"),
        (plotted, "$a$", r"\$a\$"),
        (plotted, "_a", " _a"),
        (shell, "a b", "'a b'"),
        (shell, "-a", "./-a"),
        (shell, "a/b.c", "a/b.c"),
        (literal, 'a"\n', '"a\\"\\n"'),
        (lambda t: code_block("sh", t), "a", "```sh\na\n```"),
        (lambda t: code_block("sh", t), "```", "````sh\n```\n````"),
    ],
)
def test_strings_where_something_would_be_read_into_them(how, given: str, wanted: str) -> None:
    assert how(given) == wanted


def test_a_comparison_takes_recipes_of_any_name(tmp_path) -> None:
    name = "$x^$|<b>[a](c)\udcff.toml"
    row = {
        "scheme": "W4",
        "recipe": name,
        "bits": 4.0,
        "bytes": 1,
        "perplexity": 2.0,
        "kl": 0.1,
        "top1": 0.5,
        "seconds": 1.0,
        "blocks": [{"before": 2.0, "after": 1.0}],
    }
    write_comparison(tmp_path, [row, {"scheme": "W2", "recipe": name, "error": "a | b"}], name)
    page, text = (
        (tmp_path / f).read_text(encoding="utf-8") for f in ("report.html", "comparison.md")
    )
    assert "$x^$|&lt;b&gt;[a](c)?.toml" in page
    assert r"$x^$\|\<b\>\[a\](c)?.toml" in text
    assert r"failed: a \| b" in text


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/c/models--some--tiny-model/snapshots/abc", "some/tiny-model"),
        ("models--gpt2/snapshots/abc", "gpt2"),
        ("/a/b", None),
        (".", None),
        ("/c/datasets--o--n/snapshots/abc", "o/n"),
        ("/c/models--o--n/other/abc", None),
        ("/c/models--o--n/snapshots", None),
    ],
)
def test_the_repository_of_a_folder_in_the_hubs_cache(path: str, found: str | None) -> None:
    assert hub_id(path) == found
    assert model_name({"model": path}) == Path(found or path).name


def test_a_snapshot_in_the_hubs_cache_is_called_by_its_repository(tmp_path, monkeypatch) -> None:
    snapshot = save_tiny(tmp_path / "hub" / "models--some--tiny-model" / "snapshots" / ("a" * 40))
    monkeypatch.chdir(snapshot)
    for number, model in enumerate((snapshot, ".")):
        out = tmp_path / str(number)
        args = [
            "--scheme",
            "W4A16g32",
            "--recipe",
            "rtn",
            "--calib",
            "text.txt",
            "--samples",
            2,
            "--length",
            32,
            "-o",
            out,
        ]
        assert call("quantize", model, *args)[0] == 0
        card = (out / "README.md").read_text()
        assert "# tiny-model W4A16g32" in card
        assert "base_model: some/tiny-model" in card
        assert "a" * 40 not in card
        assert "[some/tiny-model](https://huggingface.co/some/tiny-model)" in card
        assert "lowbit quantize some/tiny-model --recipe" in card


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {},
    ],
)
def test_no_result_is_lost_at_a_character(tmp_path, more: dict[str, str]) -> None:
    model = save_tiny(tmp_path / "m")
    # Where Python cannot read the path as text, tokenizers does not take it.
    if "LC_ALL" not in more:
        model = model.rename(tmp_path / "modèle 你")
    args = [
        "eval",
        str(model),
        "--text",
        str(model / "text.txt"),
        "--length",
        "32",
        "--windows",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", *args],
        capture_output=True,
        env={**os.environ, **more},
        check=False,
    )
    assert done.returncode == 0 and b"perplexity" in done.stdout and not done.stderr, done.stderr
    if not more:
        assert "modèle 你 on " in done.stdout.decode()


def test_bytes_of_a_path_that_are_no_text_are_printed_as_they_are(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "verify", b"no\xff[x]"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        check=False,
    )
    assert done.returncode == 2 and b"no\xff[x]" in done.stderr
