"""`gemma-jax chat`, with a pipe in place of the user."""

import json
import shutil

import pytest

from gemma_jax import load_tokenizer
from gemma_jax.cli.chat import was_trained_to_chat
from gemma_jax.cli.chat_commands import COMMANDS

GREEDY = ("--temperature", 0, "--max-new-tokens", 5)


def test_an_answer_per_line(cli, talker):
    ran = cli("chat", "--model", talker, *GREEDY, stdin="Hi\n\n  \nMore, Räksmörgås\n".encode())
    assert (ran.code, ran.err) == (0, "")
    assert len(ran.out.splitlines()) >= 2


def test_reset_forgets_and_quit_leaves(cli, talker):
    once = cli("chat", "--model", talker, *GREEDY, stdin=b"Hi\n")
    again = cli("chat", "--model", talker, *GREEDY, stdin=b"Hi\n/reset\nHi\n/quit\nHi\n")
    assert again.out == 2 * once.out
    assert again.code == 0


WILD = ("--temperature", 2, "--max-new-tokens", 5)  # every position draws anew


def test_earlier_turns_count(cli, talker):
    once = cli("chat", "--model", talker, *WILD, stdin=b"Hi\n")
    twice = cli("chat", "--model", talker, *WILD, stdin=b"Hi\nHi\n")
    assert twice.out.startswith(once.out)
    assert twice.out != 2 * once.out


def test_system_text_counts(cli, talker):
    words = ("chat", "--model", talker, *WILD)
    plain, system = (cli(*words, *more, stdin=b"Hi\n") for more in ((), ("--system", "capital")))
    assert plain.out != system.out


def test_outgrown_conversation_ends_a_script(cli, talker):
    lines = b"Hi\n" + b"capital " * 40 + b"\nHi\n"
    ran = cli("chat", "--model", talker, *GREEDY, "--max-len", 64, stdin=lines)
    assert ran.code == 2
    assert "outgrown its 64 tokens" in ran.err
    assert ran.err.count("\n") == 1


def test_input_that_is_no_utf8(refused, talker):
    assert "not valid UTF-8" in refused("chat", "--model", talker, stdin=b"\xff\xfe\n")


def test_impossible_values(refused, talker):
    assert "--top-p 2.0" in refused("chat", "--model", talker, "--top-p", 2)
    assert "--max-len" in refused("chat", "--model", talker, "--max-len", 0)
    assert "--max-new-tokens" in refused("chat", "--model", talker, "--max-new-tokens", 0)


def test_image_for_the_next_message(cli, seer, picture):
    words = ("chat", "--model", seer, *WILD)
    dark, light = (f"/image {picture(f'my {n}.png', level=n)}\n".encode() for n in (0, 255))
    runs = [cli(*words, stdin=lines) for lines in (b"Hi\n", dark + b"Hi\n", light + b"Hi\n")]
    assert len({ran.out for ran in runs}) == 3
    assert runs[0].err == ""
    assert runs[1].err.endswith("my 0.png, 300 x 300 pixels, goes with your next message\n")


def test_reset_forgets_images(cli, seer, picture):
    image = f"/image {picture('a.png')}\n".encode()
    words = ("chat", "--model", seer, *WILD)
    assert cli(*words, stdin=image + b"/reset\nHi\n").out == cli(*words, stdin=b"Hi\n").out


def test_pan_and_scan(cli, seer, picture):
    image = f"/image {picture('wide.png', width=600)}\nHi\n".encode()
    words = ("chat", "--model", seer, *WILD)
    assert cli(*words, stdin=image).out != cli(*words, "--pan-and-scan", stdin=image).out


def test_bad_image_ends_a_script(refused, seer, talker, tmp_path):
    missing = f"/image {tmp_path / 'none.png'}\n".encode()
    assert "none.png" in refused("chat", "--model", seer, stdin=missing)
    assert "expected a file, as in /image" in refused("chat", "--model", seer, stdin=b"/image\n")
    assert "has no vision tower" in refused("chat", "--model", talker, stdin=missing)


def test_bad_image_on_a_terminal_is_a_line(cli, seer, tmp_path):
    lines = f"/image {tmp_path / 'none.png'}\n/image\nHi\n".encode()
    ran = cli("chat", "--model", seer, *WILD, stdin=lines, terminal=True)
    assert ran.code == 0
    banner, missing, nothing = ran.err.splitlines()
    assert str(seer) in banner and all(name in banner for name in COMMANDS)
    assert missing.startswith("error: No such file") and missing.endswith("none.png")
    assert nothing == "error: expected a file, as in /image picture.png"
    assert len(ran.out.split()) > 3  # three prompts and an answer


def test_an_unknown_command_is_not_sent_to_the_model(cli, refused, talker):
    words = ("chat", "--model", talker, *GREEDY)
    assert (
        refused(*words, stdin=b"/bogus\n")
        == "there is no command /bogus; there are /image FILE, /audio FILE, /temperature X, "
        "/save FILE, /reset, /help, /quit"
    )
    ran = cli(*words, stdin=b"/bogus now\n/\n/quit now\n", terminal=True)
    assert ran.out.split() == [">"] * 3  # prompts alone
    assert [line.split(";")[0] for line in ran.err.splitlines()[1:]] == [
        "error: there is no command /bogus",
        "error: there is no command /",
    ]


def test_a_path_is_a_message(cli, talker):
    words = ("chat", "--model", talker, *GREEDY)
    ran = cli(*words, stdin=b"/etc/hosts\n")
    assert (ran.code, ran.err) == (0, "") and ran.out


def test_help_names_every_command(cli, talker):
    ran = cli("chat", "--model", talker, stdin=b"/help\n")
    assert ran.out == ""
    assert [line.split("  ")[0] for line in ran.err.splitlines()] == list(COMMANDS)


def test_temperature(cli, refused, talker):
    words = ("chat", "--model", talker, "--max-new-tokens", 5)
    greedy = cli(*words, "--temperature", 0, stdin=b"Hi\nHi\n")
    set_once = cli(*words, "--temperature", 2, stdin=b"/temperature 0\n/reset\nHi\nHi\n")
    assert (set_once.out, set_once.err) == (greedy.out, "")
    assert "expected a number, as in /temperature 0.7" in refused(*words, stdin=b"/temperature\n")
    assert "temperature=-1.0 must be" in refused(*words, stdin=b"/temperature -1\n")


def test_save(cli, refused, seer, picture, tmp_path):
    file, image = tmp_path / "chat.json", picture("a b.png")
    words = ("chat", "--model", seer, *GREEDY)
    lines = f"/image {image}\nHi\nR\u00e4ksm\u00f6rg\u00e5s\n/save {file}\n".encode()
    ran = cli(*words, "--system", "Short.", stdin=lines)
    assert ran.err.endswith(f"5 messages are in {file}\n")
    system, first, answer, second, last = json.loads(file.read_text("utf-8"))
    assert system == {"role": "system", "content": "Short."}
    items = [{"type": "image", "path": str(image)}, {"type": "text", "text": "Hi"}]
    assert first == {"role": "user", "content": items}
    assert second == {"role": "user", "content": "Räksmörgås"}
    assert [m["role"] for m in (answer, last)] == ["assistant"] * 2
    assert "".join(m["content"] + "\n" for m in (answer, last)) == ran.out
    assert "File exists" in refused(*words, stdin=f"/save {file}\n".encode())
    assert "expected a file, as in /save chat.json" in refused(*words, stdin=b"/save\n")


def test_a_base_model_is_no_assistant(cli, talker, tmp_path):
    shutil.copytree(talker, tmp_path / "tiny")
    ran = cli("chat", "--model", tmp_path / "tiny", *GREEDY, stdin=b"Hi\n")
    assert ran.code == 0 and ran.out
    assert ran.err.startswith(f"warning: nothing says that {tmp_path / 'tiny'} was trained to chat")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "name, files, chats",
    [
        ("gemma3-270m", {}, False),
        ("gemma3-4b-it", {}, True),
        ("gemma3-4b-pt", {}, False),
        ("gemma-3-4b-it", {}, True),
        ("my_model.Instruct", {}, True),
        ("with", {}, False),  # holds "it"
        ("tuned", {"chat_template.jinja": "{{ messages }}"}, True),
        ("tuned", {"generation_config.json": '{"eos_token_id": [1, 5]}'}, True),
        ("base", {"generation_config.json": '{"eos_token_id": 1}'}, False),
    ],
)
def test_what_says_that_a_model_was_trained_to_chat(
    talker, tmp_path, monkeypatch, name, files, chats
):
    monkeypatch.chdir(tmp_path)
    source = name
    if not name.startswith("gemma3"):
        source = str(tmp_path / name)
        shutil.copytree(talker, source)
    for file, text in files.items():
        (tmp_path / name / file).write_text(text)
    tokenizer = load_tokenizer(source if source != name else str(talker))
    assert tokenizer.special_ids["<end_of_turn>"] == 5
    assert was_trained_to_chat(source, tokenizer) == chats
