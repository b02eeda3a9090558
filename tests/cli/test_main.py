import io
import subprocess
import sys

import pytest

from polyhead.cli import main as cli_main
from polyhead.cli.main import VERBS
from polyhead.errors import FileError


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_answers_without_torch(words):
    code = (
        "import sys\nfrom polyhead.cli.main import main\n"
        f"code = main({words!r})\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'imported too much'\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "polyhead" in done.stdout
    assert done.stderr == ""


def test_help_teaches_every_verb_and_exit_code(cli):
    page = cli("--help").out
    for verb, line in VERBS.items():
        assert verb in page
        assert line in page
    for code in ("0 ", "1 ", "2 ", "130", "143"):
        assert f"\n  {code}" in page or code in page
    for verb in VERBS:
        assert "Examples:" in cli(verb, "--help").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["genrate", "m"], "perhaps you meant generate"),
        (["generate", "m", "hi", "--temprature", "0"], "perhaps you meant --temperature"),
        (["generate", "m", "hi", "--temperature", "hot"], "could not convert"),
        (["generate", "m", "hi", "--temperature", "-1"], "temperature=-1.0 must be"),
        (["generate", "no/such/model/here", "hi"], "no such file or directory"),
        (["generate", "m"], "there is no prompt"),
        (["perplexity", "m", "no-such.txt"], "cannot read no-such.txt"),
        (["train", "no-such.txt"], "no such file or folder: no-such.txt"),
        (["train", "pydocs", "--lr", "-1"], "lr is -1.0"),
        (["train", "pydocs", "--config", "no.toml"], "cannot read no.toml"),
        (["info", "no-such-model"], "no such file or directory"),
        (["pull", "no-such-model"], "not one of"),
        (["convert", "m", "x"], "--to"),
    ],
)
def test_bad_input_is_one_line_and_code_2(cli, words, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("polyhead: ")
    assert err.count("\n") == 1, err
    assert said in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FileError("x.gguf is cut short"), 2, "x.gguf is cut short"),
        (ValueError("scores are\nnot finite"), 2, "scores are not finite"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "a.txt: No such file"),
        (MemoryError(), 2, "out of memory"),
        (TypeError("oops"), 70, "fault: TypeError: oops; --debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_a_line_and_a_code(cli, monkeypatch, error, code, said):
    from polyhead.cli import pull

    def fail(args):
        raise error

    monkeypatch.setattr(pull, "run", fail)
    found = cli("pull")
    assert (found.code, found.out, found.err) == (code, "", f"polyhead: {found.err[10:]}")
    assert said in found.err
    assert found.err.count("\n") == 1
    assert "Traceback" not in found.err
    if code != 130:
        assert "Traceback" in cli("pull", "--debug").err


def test_an_interrupted_training_keeps_its_code(cli, monkeypatch, tmp_path):
    from polyhead.cli import pull
    from polyhead.train.loop import Interrupted

    def stop(args):
        raise Interrupted(15, 7, tmp_path)

    monkeypatch.setattr(pull, "run", stop)
    found = cli("pull")
    assert found.code == 143
    assert "stopped after step 7" in found.err


def test_no_words_shows_the_page_and_fails(cli):
    found = cli()
    assert found.code == 2
    assert found.out == cli_main.HELP


def test_version(cli):
    assert cli("--version").out.startswith("polyhead ")


def test_a_terminal_without_lines_to_draw_gets_the_words_alone(monkeypatch, cli):
    """tyro draws its box with hyphens where standard output names no encoding."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    found = cli("tag", "model", "text", "--aggregation", "odd")
    assert found.code == 2
    assert found.err.startswith("polyhead: invalid choice 'odd'")
    assert "---" not in found.err
