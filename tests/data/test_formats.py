import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.data.formats import (
    BadRows,
    Demonstration,
    Preference,
    demonstration_reader,
    preference_reader,
    prompt_reader,
    read_rows,
)
from rto_lightning.data.sources import Table
from rto_lightning.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
HI = [user("Hi")]
TURNS = [SYSTEM, user("Hi"), assistant("Hello"), user("More")]


def read(reader, *rows, bad_rows="error"):
    table = Table("rows.jsonl", list(dict.fromkeys(key for row in rows for key in row)), list(rows))
    return read_rows(reader(table), enumerate(rows), BadRows(table, bad_rows))


def one(reader, row):
    [(index, example)] = read(reader, row)
    assert index == 0
    return example


PREFERENCES = {
    "texts": ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, HI),
    "messages as prompt": ({"prompt": TURNS, "chosen": "a", "rejected": "b"}, TURNS),
    "messages as answers": ({"prompt": HI, "chosen": [assistant("a")], "rejected": [assistant("b")]}, HI),
    "text and messages": ({"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}, HI),
    "ultrafeedback_binarized": (
        {
            "prompt": "Hi",
            "prompt_id": "f0",
            "chosen": [user("Hi"), assistant("a")],
            "rejected": [user("Hi"), assistant("b")],
            "messages": [user("Hi"), assistant("a")],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        HI,
    ),
    "messages that hold the prompt": (
        {"chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]},
        TURNS,
    ),
    "the prompt twice": (
        {"prompt": TURNS, "chosen": [*TURNS, assistant("a")], "rejected": [*TURNS, assistant("b")]},
        TURNS,
    ),
    "a prompt that goes on in the answers": (
        {
            "prompt": TURNS[:2],
            "chosen": [*TURNS[2:], assistant("a")],
            "rejected": [*TURNS[2:], assistant("b")],
        },
        TURNS,
    ),
    "Anthropic-HH": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant: a",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant: b",
        },
        TURNS[1:],
    ),
    "HH with its prompt apart": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"},
        HI,
    ),
    "unknown keys in messages": (
        {"prompt": [{"name": "Ann", **user("Hi")}], "chosen": "a", "rejected": "b"},
        HI,
    ),
}


@pytest.mark.parametrize("row, prompt", PREFERENCES.values(), ids=PREFERENCES)
class TestPreferenceFormats:
    def test_as_preferences(self, row, prompt):
        assert one(preference_reader, row) == Preference(prompt, "a", "b")

    def test_as_prompts(self, row, prompt):
        assert one(prompt_reader, row).prompt == prompt

    def test_as_demonstrations(self, row, prompt):
        assert one(demonstration_reader, row) == Demonstration(prompt, "a")


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "Hi"}, HI),
        ({"prompt": TURNS}, TURNS),
        ({"prompt": "Hi", "messages": TURNS}, HI),
        ({"messages": TURNS}, TURNS),
        ({"messages": [*TURNS, assistant("a")]}, TURNS),
        ({"prompt": "More", "context_messages": TURNS}, TURNS),
        ({"prompt": "Hi", "response": "a"}, HI),
        ({"instruction": "Hi", "output": "a"}, HI),
        ({"instruction": "Translate:", "input": "Hi", "output": "a"}, [user("Translate:\n\nHi")]),
    ],
)
def test_prompts(row, prompt):
    assert one(prompt_reader, row).prompt == prompt


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "Hi", "response": "a"}, HI),
        ({"prompt": TURNS, "response": "a"}, TURNS),
        ({"prompt": "Hi", "completion": "a"}, HI),
        ({"prompt": HI, "completion": [assistant("a")]}, HI),
        ({"messages": [*TURNS, assistant("a")]}, TURNS),
        ({"prompt": "Hi", "prompt_id": "0", "messages": [*TURNS, assistant("a")]}, TURNS),
        ({"instruction": "Hi", "output": "a", "generator": "x", "dataset": "y"}, HI),
        ({"instruction": "Hi", "input": "", "output": "a"}, HI),
        ({"instruction": "Translate:", "input": "Hi", "output": "a"}, [user("Translate:\n\nHi")]),
    ],
)
def test_demonstrations(row, prompt):
    assert one(demonstration_reader, row) == Demonstration(prompt, "a")


@pytest.mark.parametrize("reader", [prompt_reader, demonstration_reader])
def test_rows_of_one_table_may_have_different_columns(reader):
    rows = [
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"messages": [*HI, assistant("a")]},
        {"prompt": "Hi", "response": "a"},
        {"context_messages": HI, "prompt": "Hi", "completion": "a"},
    ]
    for order in (rows, rows[::-1]):
        examples = [example for _, example in read(reader, *order)]
        assert examples == [reader(Table("one", list(row), [row]))(row) for row in order]
        assert all(example.prompt == HI for example in examples)


def test_an_answers_spaces_are_kept():
    assert one(preference_reader, {"prompt": "Hi", "chosen": " a\n", "rejected": "b"}).chosen == " a\n"


@pytest.mark.parametrize(
    "reader, expected",
    [
        (preference_reader, "`chosen` and `rejected`, with `prompt` or with the prompt inside them"),
        (prompt_reader, "one of `prompt`, `messages`, `context_messages`, `chosen` and `instruction`"),
        (
            demonstration_reader,
            "`prompt` with `response` or `completion`, or `instruction` with `output`, or `messages`, or `chosen`",
        ),
    ],
)
def test_a_missing_column_names_what_is_there_and_what_is_needed(reader, expected):
    with pytest.raises(UserError) as error:
        read(reader, {"question": "Hi", "answer": "a"})
    assert str(error.value) == (
        f"rows.jsonl has the columns `question`, `answer`, but needs {expected}; rename or add columns."
    )


BAD = {
    "empty answer": (
        preference_reader,
        {"prompt": "Hi", "chosen": " \n", "rejected": "b"},
        "the answer in `chosen` is empty",
    ),
    "empty prompt": (
        preference_reader,
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        "the prompt in `prompt` is empty",
    ),
    "no answer": (
        preference_reader,
        {"prompt": "Hi", "chosen": "a", "rejected": None},
        "`rejected` is neither text nor a list",
    ),
    "no prompt": (
        preference_reader,
        {"chosen": "a", "rejected": "b"},
        "`prompt` is missing and `chosen` is no transcript",
    ),
    "two prompts": (
        preference_reader,
        {"chosen": [*HI, assistant("a")], "rejected": [user("Ho"), assistant("b")]},
        "`chosen` and `rejected` answer different prompts",
    ),
    "answer by the user": (
        preference_reader,
        {"chosen": HI, "rejected": HI},
        "the last message of `chosen` is not the assistant's",
    ),
    "transcript that ends with a question": (
        preference_reader,
        {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        "the last turn of `chosen` is not the assistant's",
    ),
    "empty list": (
        preference_reader,
        {"prompt": "Hi", "chosen": [], "rejected": "b"},
        "`chosen` is not a list of messages",
    ),
    "message without content": (
        prompt_reader,
        {"messages": [{"role": "user"}]},
        "no `role` and `content` of text",
    ),
    "message that is text": (prompt_reader, {"messages": ["Hi"]}, "a message of `messages` is not an object"),
    "unknown role": (
        prompt_reader,
        {"messages": [{"role": "human", "content": "Hi"}]},
        "has the role 'human', which is none",
    ),
    "nobody asks": (prompt_reader, {"messages": [SYSTEM]}, "does not end with a message of the user"),
    "an answer for a prompt": (
        prompt_reader,
        {"prompt": [*HI, assistant("a")]},
        "does not end with a message of the user",
    ),
    "a number for a prompt": (prompt_reader, {"prompt": 3}, "`prompt` is neither text nor a list of messages"),
    "a question for a demonstration": (
        demonstration_reader,
        {"messages": TURNS},
        "the last message of `messages` is not",
    ),
}


@pytest.mark.parametrize("reader, row, reason", BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(reader, row, reason):
    if reader is preference_reader:
        good = {"chosen": [*HI, assistant("a")], "rejected": [*HI, assistant("b")]}
    else:
        good = {"messages": [*HI, assistant("a")]} if "messages" in row else {"prompt": "Hi"}
    with pytest.raises(UserError) as error:
        read(reader, good, row)
    assert str(error.value).startswith("Row 2 of rows.jsonl: ")
    assert reason in str(error.value)
    assert str(error.value).endswith("; correct it, or set data.bad_rows to `skip`.")
    assert [index for index, _ in read(reader, row, good, bad_rows="skip")] == [1]


COLUMNS = ["prompt", "chosen", "rejected", "messages", "context_messages", "response", "completion"]
COLUMNS += ["instruction", "input", "output"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]) | st.text(max_size=3), inner, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "bot"]), "content": inner})
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("reader", [preference_reader, prompt_reader, demonstration_reader])
@given(row=st.dictionaries(st.sampled_from(COLUMNS), anything))
def test_whatever_a_row_holds_it_is_read_or_bad(reader, row):
    good = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    examples = read(reader, good, row, bad_rows="skip")
    assert examples[0][0] == 0
    for _, example in examples:
        assert example.prompt[-1]["role"] in ("user", "tool")
        assert all(isinstance(message["content"], str) for message in example.prompt)


def test_skipped_rows_are_counted():
    table = Table("rows.jsonl", ["prompt"], [{"prompt": ""}, {"prompt": "Hi"}, {"prompt": None}])
    bad_rows = BadRows(table, "skip")
    read_rows(prompt_reader(table), enumerate(table.rows), bad_rows)
    assert bad_rows.count == 2


@pytest.mark.parametrize("reader", [preference_reader, prompt_reader, demonstration_reader])
def test_readers_go_to_other_processes(reader):
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    read = reader(Table("rows.jsonl", list(row), [row]))
    assert pickle.loads(pickle.dumps(read))(row) == read(row)
