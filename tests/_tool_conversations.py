"""Conversations with tools, for tests of what is written and read."""

from gemma_keras_tune.gemma.tools import ADVICE
from gemma_keras_tune.pairs.conversations import put_tools, read_conversation
from gemma_keras_tune.pairs.tools import read_tools
from gemma_keras_tune.pairs.unused import Unused


def function(name, description, parameters=None, **more):
    schema = {"parameters": parameters} if parameters is not None else {}
    described = {"name": name, "description": description, **schema, **more}
    return {"type": "function", "function": described}


WEATHER = function(
    "get_current_weather",
    "Gets the current weather in a given location.",
    {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": 'City, e.g. "Tokyo, JP"'},
            "unit": {
                "type": "string",
                "description": "The unit.",
                "enum": ["celsius", "fahrenheit"],
            },
        },
        "required": ["location"],
    },
)
BOOKING = function(
    "book.table-2",
    "Book a table",
    {
        "type": "object",
        "properties": {
            "Zone": {"type": "integer"},
            "guests": {
                "type": "array",
                "description": "Who comes",
                "items": {
                    "type": "object",
                    "properties": {
                        "age": {"type": "number", "nullable": True},
                        "vip": {"type": "boolean"},
                    },
                    "required": ["age"],
                },
            },
            "notes": {
                "type": "array",
                "items": {"type": "string", "enum": ["a", "b"], "minLength": 1},
            },
            "place": {
                "type": "object",
                "description": "Where",
                "properties": {"room": {"type": "string", "enum": ["hall"]}},
                "required": ["room"],
            },
            "free": {"type": "object", "nullable": True},
            "alpha": {"type": "string", "description": "", "nullable": True},
        },
        "required": ["guests", "place"],
    },
)
PING = function("ping", "", {"type": "object", "properties": {}})
BARE = function("now", "The time")
TOOLS = [WEATHER, BOOKING, PING, BARE]
SYSTEM = {"role": "system", "content": f" {ADVICE}\n"}
ASK = {"role": "user", "content": "What's the weather in Tokyo right now? "}


def calling(*calls, content=None):
    made = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(content, number=0, name=None):
    return {"role": "tool", "tool_call_id": f"c{number}", "content": content} | (
        {"name": name} if name else {}
    )


CALL = calling(("get_current_weather", {"location": "Tokyo, Japan", "unit": "celsius"}))
NESTED = calling(
    (
        "book.table-2",
        {
            "Zone": 3, "guests": [{"vip": True, "age": 4.5}, {"vip": False, "age": 1e-7}],
            "place": {"room": "hall"}, "notes": ["x, {y}", "ü:"], "free": {}, "empty": [],
        },
    ),
    ("ping", {}),
)  # fmt: skip
SUNNY = result({"weather": "sunny", "temperature": 15}, name="get_current_weather")
FINE = {"role": "assistant", "content": "It is sunny. "}
CONVERSATIONS = {
    "call": [SYSTEM, ASK, CALL],
    "no system": [ASK, CALL],
    "answer": [SYSTEM, ASK, CALL, SUNNY, FINE],
    "text result": [ASK, CALL, result("15 °C, {sunny}", name="get_current_weather"), FINE],
    "parallel": [
        SYSTEM, ASK, NESTED, result("done", 0, "book.table-2"), result({"ok": True}, 1, "ping"),
        FINE,
    ],
    "two steps": [
        SYSTEM, ASK, CALL, SUNNY, NESTED, result({"list": [1, "a"]}, 0, "book.table-2"),
        result("pong", 1, "ping"), FINE, {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome."},
    ],
    "text and call": [SYSTEM, ASK, calling(("ping", {}), content="Let me look."), ],
    "no call": [SYSTEM, ASK, {"role": "assistant", "content": "I cannot know."}],
}  # fmt: skip


def messages_of(conversation, tools=TOOLS, **options):
    problems = []
    read = read_tools(tools, "tools", Unused(), problems)
    assert not problems
    return put_tools(read_conversation(conversation, **options), read)
