"""`gemma-jax chat`, with a pipe in place of the user."""

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
    assert "top_p=2.0" in refused("chat", "--model", talker, "--top-p", 2)
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
    assert "reads text alone" in refused("chat", "--model", talker, stdin=missing)


def test_bad_image_on_a_terminal_is_a_line(cli, seer, tmp_path):
    lines = f"/image {tmp_path / 'none.png'}\n/image\nHi\n".encode()
    ran = cli("chat", "--model", seer, *WILD, stdin=lines, terminal=True)
    assert ran.code == 0
    missing, nothing = ran.err.splitlines()
    assert missing.startswith("error: No such file") and missing.endswith("none.png")
    assert nothing == "error: expected a file, as in /image picture.png"
    assert len(ran.out.split()) > 3  # three prompts and an answer
