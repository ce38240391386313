"""A chat: the plain function, the cell without a browser, what a notebook keeps of it."""

from __future__ import annotations

import asyncio
import types

import ipywidgets
import mlx.core as mx
import nbformat
import pytest
from ipywidgets.widgets.widget import _instances
from nbclient import NotebookClient

from tests.toy import toy_base
from workbench.errors import ConfigError, DataError
from workbench.evaluation.generation import generate
from workbench.live import chat as chat_module
from workbench.live import chat_controls, conversation
from workbench.live.chat import NOBODY, ChatCell, chat
from workbench.live.chat_controls import INSTEAD, ChatControls
from workbench.live.controls import VIEW
from workbench.live.conversation import CURSOR, OFF, ON, Transcript, Turn, transcript_html
from workbench.live.outputs import HTML
from workbench.probes.parameters import changed, fingerprint
from workbench.tuning.lora import LoRAConfig, adapter_disabled, add_lora


def adapted():
    """A toy base whose adapter changes what it says."""
    base = toy_base()
    add_lora(base.model, LoRAConfig(rank=4, alpha=8.0))
    for path, module in base.model.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(len(path)))
    mx.eval(base.model.parameters())
    return base


def user(text):
    return {"role": "user", "content": text}


def test_a_list_of_questions_gives_the_answers_of_one_conversation():
    base = toy_base()
    talk = chat(base, ["one?", "two?"], max_tokens=6, system="be short")
    system = {"role": "system", "content": "be short"}
    first = generate(base, [system, user("one?")], max_tokens=6)
    said = {"role": "assistant", "content": first}
    second = generate(base, [system, user("one?"), said, user("two?")], max_tokens=6)
    assert [turn.answers for turn in talk] == [{ON: first}, {ON: second}]
    assert talk.messages()[:2] == [user("one?"), said]
    assert str(talk).startswith("you: one?\nwith adapter: ")


def test_both_sides_answer_and_each_remembers_its_own():
    base = adapted()
    before = fingerprint(base.model)
    talk = chat(base, ["one?", "two?"], adapter="both", max_tokens=6)
    with adapter_disabled(base.model):
        alone = generate(base, [*Transcript(talk[:1]).messages(OFF), user("two?")], max_tokens=6)
    assert talk[1].answers[OFF] == alone
    assert talk[0].answers[ON] != talk[0].answers[OFF]
    assert talk[0].answers[ON] == generate(base, "one?", max_tokens=6)
    assert chat(base, "one?", adapter="off", max_tokens=6)[0].answers == {OFF: talk[0].answers[OFF]}
    assert changed(before, fingerprint(base.model)) == []


def test_a_temperature_samples_and_the_same_seed_again():
    base = toy_base()
    warm = [chat(base, ["a", "a"], max_tokens=9, temperature=1.0) for _ in range(2)]
    assert str(warm[0]) == str(warm[1]) != str(chat(base, ["a", "a"], max_tokens=9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "both"}, "no adapter is attached"),
        ({"adapter": True}, "adapter must be one of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_bad_settings_are_named(settings, message):
    for questions in (None, ["a"]):
        with pytest.raises(ConfigError, match=message):
            chat(toy_base(), questions, **settings)


@pytest.mark.parametrize("questions", [3, [3], [None], [["a"]]])
def test_questions_that_are_no_texts_are_named(questions):
    with pytest.raises(DataError, match="questions must be texts"):
        chat(toy_base(), questions)


def test_a_question_too_long_is_an_error_of_the_plain_function():
    with pytest.raises(DataError, match="the model has room for 512"):
        chat(toy_base(), ["x" * 600])


def test_everything_shown_is_escaped_and_whole():
    bad = "<script>alert(1)</script> $\\frac{" + "x" * 3000 + "END"
    turn = Turn(bad, {ON: bad, OFF: "b"}, {OFF: "<b>no</b>"}, stopped=True)
    html = transcript_html([turn], (ON, OFF), live=True)
    assert "<script" not in html
    assert "<b>" not in html
    assert "$\\frac" not in html
    assert html.count("END") == 2
    assert "stopped" in html
    assert "without adapter" in html


def test_an_answer_names_its_side_unless_it_is_the_model_as_it_is():
    assert "with adapter" not in transcript_html([Turn("q", {ON: "a"})])
    assert "without adapter" in transcript_html([Turn("q", {OFF: "a"})])
    assert "with adapter" in transcript_html([Turn("q", {ON: "a", OFF: "b"})])


def test_a_transcript_shows_itself_unless_the_cell_does(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    talk = Transcript([Turn("q", {ON: "a"})])
    talk._ipython_display_()
    talk.shown = True
    talk._ipython_display_()
    assert len(shown) == 1
    assert "q" in shown[0][HTML]


def test_a_cell_outside_of_a_notebook_says_what_to_do():
    cell = chat(toy_base())
    assert "await" in repr(cell)
    with pytest.raises(ConfigError, match=r"needs a notebook\. Give questions"):
        asyncio.run(wait_for(cell))


async def wait_for(cell):
    """What awaiting gives."""
    return await cell


class Reader:
    """Does to the widgets what a person in a browser would, while the cell runs."""

    def __init__(self, base, monkeypatch, **settings):
        self.bundles = []
        shell = types.SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": True}})
        monkeypatch.setattr(chat_module, "kernel_shell", lambda: shell)
        monkeypatch.setattr(chat_module, "Slot", lambda: self)
        monkeypatch.setattr(chat_controls, "SETTLE", 0.01)
        monkeypatch.setattr(ChatCell, "_retired", None)
        self.cell = chat(base, **{"max_tokens": 8, **settings})

    def show(self, bundle):
        self.bundles.append(bundle)

    def run(self, script) -> Transcript:
        """Run the cell beside a coroutine that gets this reader; returns the transcript."""

        async def both():
            self.task = asyncio.current_task()
            opened = asyncio.ensure_future(wait_for(self.cell))
            while not self.bundles:
                await asyncio.sleep(0)
            self.controls = ChatCell._retired
            async with asyncio.timeout(20):
                await script(self)
            return await asyncio.wait_for(opened, 20)

        return asyncio.run(both())

    def press(self, name):
        (button,) = [b for b in self.controls._buttons if b.description == name]
        button.click()

    async def ask(self, text, done=True):
        """Type a question, press Enter, wait for its answer."""
        turns = len(self.cell._talk.turns)
        self.controls._field.value = text
        self.controls._field._handle_msg(
            {
                "content": {"data": {"method": "custom", "content": {"event": "submit"}}},
                "buffers": [],
            }
        )
        while done and len(self.cell._talk.turns) == turns:
            await asyncio.sleep(0.01)


@pytest.fixture
def reader(monkeypatch):
    """Opens a chat cell with somebody before it; all widgets are closed afterwards."""
    before = set(_instances)
    yield lambda base, **settings: Reader(base, monkeypatch, **settings)
    for key in set(_instances) - before:
        _instances[key].close()


def test_a_cell_answers_clears_and_leaves_plain_html(reader):
    base = adapted()
    me = reader(base, adapter="both")

    async def script(me):
        await me.ask("first <i>?")
        assert me.controls._field.value == ""
        await me.ask("  second?  ")
        assert me.controls._done.value.count("second?") == 1
        me.press("Clear")
        await asyncio.sleep(0.15)
        assert me.controls._done.value == ""
        me.controls._adapter.value = "off"
        await me.ask("third?")
        me.press("End")

    talk = me.run(script)
    assert [turn.question for turn in talk] == ["third?"]
    assert talk[0].answers == {
        OFF: chat(base, "third?", adapter="off", max_tokens=8)[0].answers[OFF]
    }
    assert VIEW in me.bundles[0]
    assert VIEW not in me.bundles[-1]
    assert "third?" in me.bundles[-1][HTML]
    assert talk.shown


def test_an_answer_grows_and_stop_ends_it(reader):
    me = reader(toy_base(), max_tokens=400, temperature=1.0)

    async def script(me):
        await me.ask("go on", done=False)
        seen = []
        while len(set(seen)) < 3:
            await asyncio.sleep(0)
            seen.append(me.controls._current.value)
        me.press("Stop")
        while me.controls._current.value:
            await asyncio.sleep(0)
        me.press("End")

    talk = me.run(script)
    assert talk[0].stopped
    assert 0 < len(talk[0].answers[ON]) < 390
    assert "stopped" in me.bundles[-1][HTML]


def test_what_cannot_be_asked_is_shown_and_the_chat_goes_on(reader):
    me = reader(toy_base())

    async def script(me):
        await me.ask("x" * 600)
        me.controls._tokens.value = 0
        await me.ask("second")
        me.controls._tokens.value = 5
        await me.ask("third")
        me.press("End")

    talk = me.run(script)
    assert "room for 512" in talk[0].errors[ON]
    assert "max_tokens" in talk[1].errors[ON]
    assert talk[2].answers[ON] == generate(toy_base(), "third", max_tokens=5)
    assert len(talk.messages()) == 2
    assert "no answer" in me.bundles[-1][HTML]


def test_an_interrupt_ends_the_chat_and_leaves_the_network_as_it_was(reader):
    base = adapted()
    me = reader(base, max_tokens=400, temperature=1.0, adapter="off")

    async def script(me):
        await me.ask("go on", done=False)
        while CURSOR not in me.controls._current.value:
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task(), me.task}:
            task.cancel()

    talk = me.run(script)
    assert talk[0].stopped
    assert HTML in me.bundles[-1]
    assert base.model.training
    assert generate(base, "a", max_tokens=8) == generate(adapted(), "a", max_tokens=8)


def test_other_errors_end_the_cell_with_the_conversation_in_it(reader, monkeypatch):
    me = reader(toy_base())

    async def script(me):
        await me.ask("first")
        monkeypatch.setattr(conversation, "stream", fail)
        await me.ask("second", done=False)

    with pytest.raises(RuntimeError, match="planted"):
        me.run(script)
    assert "first" in me.bundles[-1][HTML]


def fail(*args, **settings):
    """A defect: nothing that a reader could cure."""
    raise RuntimeError("planted")
    yield


def test_a_text_that_was_left_in_the_field_is_not_sent(reader):
    me = reader(toy_base())

    async def script(me):
        me.controls._field.value = "half a quest"  # as when the field loses the focus
        await asyncio.sleep(0.2)
        assert not me.cell._talk.turns
        assert me.controls._field.value == "half a quest"
        me.press("Send")
        while not me.cell._talk.turns:
            await asyncio.sleep(0.01)
        me.press("End")

    assert [turn.question for turn in me.run(script)] == ["half a quest"]


def test_the_end_closes_all_but_the_conversation_and_the_next_chat_the_rest(reader):
    before = set(_instances)

    async def script(me):
        await me.ask("a")
        me.press("End")

    me = reader(toy_base())
    me.run(script)
    left = [_instances[key] for key in set(_instances) - before]
    assert not [w for w in left if isinstance(w, ipywidgets.Button | ipywidgets.Text)]
    ChatCell._retired.close()
    assert set(_instances) == before


def test_widgets_without_an_adapter_offer_no_choice():
    controls = ChatControls(None, 8, 0.0)
    assert controls.sides == (ON,)
    assert controls._adapter not in controls._settings.children
    assert INSTEAD in controls.bundle.values()
    controls.retire()
    controls.close()


CELLS = [
    "import workbench as wb\nfrom tests.toy import toy_base\nbase = toy_base()\n"
    "from workbench.live.chat import chat",
    "talk = await chat(base)\ntalk",
    "chat(base, ['<b>one</b>'], max_tokens=4)",
]


def test_papermill_gets_a_note_or_the_transcript_and_no_widget(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in CELLS])
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(chat_module.__file__).rsplit("/workbench/", 1)[0])
        client.execute()
    _, awaited, asked = [cell.outputs for cell in notebook.cells]
    assert [output["data"]["text/plain"] for output in awaited] == [NOBODY]
    (shown,) = asked
    assert "&lt;b&gt;one" in shown["data"][HTML]
    assert VIEW not in shown["data"]
