"""Normalizing removes what cannot be spoken and keeps the words, for any string."""

from __future__ import annotations

import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_model import SegmentLengths
from text_normalizer import has_speech, normalize_text
from text_splitter import split_text

MARKUP = [
    "# ",
    "**",
    "*",
    "_",
    "`",
    "```\n",
    "```text\n",
    "[",
    "](",
    "](https://x.org/a_b)",
    ")",
    "![",
    "> ",
    "- ",
    "1. ",
    "\n",
    "\n\n",
    "  \n",
    "| ",
    "|",
]
MARKUP += [
    "|---|---|\n",
    "<b>",
    "</b>",
    "<!-- ",
    "-->",
    "<script>",
    "</script>",
    "<div>\n",
    "<",
    ">",
    "&amp;",
    "&lt;",
    "\\",
    "~~",
    "---\n",
    "===\n",
    "[^1]",
]
MARKUP += [
    "https://a.bc/d_e?f=g",
    "www.a.bc",
    "://",
    "[A]: b\n",
    "🎉",
    "👩🏽‍🚀",
    "1️⃣",
    "🇩🇪",
    "•",
    "\u200d",
    "\ufeff",
    "\x00",
    "\ud83d",
    "\ue000",
    "\t",
    "\r\n",
]
WORDS = ["word", "two words", "Ende.", "字", "नमस्ते", "می‌خواهم", "3.14", "é", "?", "...", " "]
any_text = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=200),
    st.lists(st.sampled_from(MARKUP + WORDS), max_size=60).map("".join),
)

plain = st.lists(st.sampled_from(["word", "Name", "fine", "4096", "naïve", "größer"]), min_size=1, max_size=6).map(" ".join)
marked = plain.flatmap(
    lambda words: st.sampled_from(
        [words, f"**{words}**", f"*{words}*", f"~~{words}~~", f"`{words}`", f"[{words}](https://x.org/{words[0]})"]
    )
)
block = st.one_of(
    marked,
    marked.map(lambda words: f"## {words}"),
    marked.map(lambda words: f"> {words}"),
    st.lists(marked, min_size=1, max_size=4).map(lambda items: "\n".join(f"- {item}" for item in items)),
    st.lists(marked, min_size=1, max_size=4).map(lambda items: "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))),
    st.lists(marked, min_size=2, max_size=2).map(lambda cells: f"| {cells[0]} | {cells[1]} |\n|---|---|\n| {cells[1]} | {cells[0]} |"),
)
documents = st.lists(block, min_size=1, max_size=5).map("\n\n".join)


@settings(max_examples=500, deadline=None)
@given(any_text)
def test_any_string_becomes_clean_text(text: str) -> None:
    result = normalize_text(text)
    assert result == "" or has_speech(result)
    assert not regex.search(r"[[\p{Cc}\p{Cs}\p{Co}\p{Cn}\p{Default_Ignorable_Code_Point}]--[\n\u200c\u200d]]", result, flags=regex.V1)
    assert not regex.search(r"\p{Emoji_Presentation}", result)
    assert result == unicodedata.normalize("NFC", result)
    assert all(line == line.strip() and "  " not in line for line in result.split("\n"))


@settings(max_examples=300, deadline=None)
@given(documents)
def test_markdown_loses_its_markup_and_no_word(text: str) -> None:
    result = normalize_text(text)
    words = regex.findall(r"\b\p{L}{2,}|4096", regex.sub(r"https://\S+?\)", "", text))
    assert regex.findall(r"\b\p{L}{2,}|4096", result) == words
    assert not regex.search(r"[*_~`#>|\[\]]", result)


@settings(max_examples=300, deadline=None)
@given(st.one_of(documents, any_text.filter(lambda text: "\\" not in text and "&" not in text)))
def test_normalizing_again_changes_nothing(text: str) -> None:
    result = normalize_text(text)
    assert normalize_text(result) == result


@pytest.mark.parametrize(
    "text",
    [
        "Plain text, nothing else.",
        "5 * 3 * 2 is 30, and 2 < 3 > 1.",
        "Rename snake_case_name to a_b in C# for $5 & 50% off.",
        "He is #1, or ~5th. A|B or A/B?",
        "Write to jane.doe@example.com at 10:30.",
        "1. Preheat the oven.",
        "1984.",
        "[Alice]: hello there",
        "It was... 3.14; “really”?",
        "AT&T and Q&A are 5° off. © 2024",
        "Settings → General",
        "你好，世界。",
        "नमस्ते। می‌خواهم",
        "+49 171 555",
    ],
)
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert normalize_text(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# A *title*\n\nSome **bold**, _soft_ and ~~old~~ words.", "A title.\n\nSome bold, soft and old words."),
        ("Title\n=====\nText", "Title.\n\nText"),
        ("# Really?\n# 二\n", "Really?\n\n二。"),
        ("- one\n- two!\n  - inner\n\n1. first\n2) second", "one.\n\ntwo!\n\ninner.\n\n1. first.\n\n2) second."),
        ("- [ ] open\n- [x] done", "open.\n\ndone."),
        ("• one\n• two", "one.\n\ntwo."),
        ("| Name | Age |\n|------|----:|\n| Ada  | `36` |\n| **Bob** | |", "Name, Age.\n\nAda, 36.\n\nBob."),
        ("> quoted\n> on\n\nand on", "quoted on\n\nand on"),
        ("wrapped\nlines\n\nand 漢\n字", "wrapped lines\n\nand 漢字"),
        ("line one  \nline two", "line one\n\nline two"),
        ("    indented text\n    goes on", "indented text goes on"),
        ("above\n\n---\n\nbelow", "above\n\nbelow"),
    ],
)
def test_blocks_become_sentences(text: str, expected: str) -> None:
    assert normalize_text(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("See [the page](https://x.org/a_b_c 'title') and ![a cat](cat.png).", "See the page and a cat."),
        ("See https://www.example.com/a_b/c*d*?e=f#g. Now", "See example.com. Now"),
        ("<https://example.org/x_y_z>, (www.example.com/foo_(bar)), **https://a.bc/d_**", "example.org, (example.com), a.bc"),
        ("请看https://example.com/path，谢谢", "请看example.com，谢谢"),
        ("http://user:secret@host.example:8080/path file:///etc/passwd", "host.example link"),
        ("[](https://x.org/y) and [text][1].\n\n[1]: https://x.org/z", "x.org and text."),
        ("A claim.[^1]\n\n[^1]: Its source.", "A claim.\n\nIts source."),
    ],
)
def test_links_become_their_text_or_their_host(text: str, expected: str) -> None:
    assert normalize_text(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Use `a_b` or the `<div>` tag.", "Use a_b or the div tag."),
        ("Try this:\n\n```python\nprint('x')\n```\n\nIt works.", "Try this:\n\nIt works."),
        ("```python\nprint('hello', x_1)\nreturn\n```", "print hello x 1.\n\nreturn."),
        ("```text\nDear *Bob*,\nthanks.\n```", "Dear Bob, thanks."),
        ("~~~\nnever closed", "never closed."),
    ],
)
def test_code_is_kept_inline_and_where_there_is_nothing_else(text: str, expected: str) -> None:
    assert normalize_text(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Fish &amp; <b>chips</b>,<br>hot", "Fish & chips,\n\nhot"),
        ("<div>\n<p>One <i>two</i></p>\n</div>\n\n<!-- hidden\n\n words -->\nthree", "One two\n\nthree"),
        ("<script>\nvar x = 1;\n\nvar y;\n</script>\nText <style>p {}</style>here", "Text here"),
        ('<speak>Hello <break time="1s"/>you</speak>', "Hello you"),
        ("Dear <your name>, welcome", "Dear your name, welcome"),
    ],
)
def test_html_tags_go_and_their_text_stays(text: str, expected: str) -> None:
    assert normalize_text(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Great job 👏🏽! See you 👨‍👩‍👧 in 🇩🇪 soon 🎉", "Great job! See you in soon"),
        ("**🔥 Big news 🔥** now", "Big news now"),
        ("✅ Tests pass\n❌ Lint fails", "Tests pass.\n\nLint fails."),
        ("🎉 Party tonight", "Party tonight"),
        ("1️⃣ First\n2️⃣ Second, #️⃣5", "1. First.\n\n2. Second, #5."),
        ("Wow‼️ ©️ 2024 ™️", "Wow!! © 2024 ™"),
        ("\ufeffa\u200bb\u202ec\x00d\ud800e\ue000\u00ad\x1b f\u00a0g", "abcde f g"),
        ("e\u0301te\u0301", "été"),
        ("██▓▒ 50 %", "50 %"),
    ],
)
def test_pictures_and_invisible_characters_go(text: str, expected: str) -> None:
    assert normalize_text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "...",
        "?!",
        "***",
        "---",
        "🎉 👍🏽",
        "\u200b\ufeff",
        "| |\n|-|\n",
        "[](x)",
        "<br>",
        "\ud800",
        "```\n```",
        "====",
        "#",
        "“”",
    ],
)
def test_text_with_nothing_to_speak_becomes_empty(text: str) -> None:
    assert normalize_text(text) == ""


@pytest.mark.parametrize("text", ["a", "7", "字", "ท", "½", "%", "&", "x = 1", "Ⅳ", "٣"])
def test_letters_digits_and_named_symbols_of_any_script_are_speech(text: str) -> None:
    assert has_speech(text)
    assert normalize_text(text) == text


UNITS = [
    "[",
    "[a ",
    "![",
    "[[]",
    "**a",
    "`",
    "> ",
    ">",
    "- ",
    "<b>",
    "<x> ",
    "<!--",
    "<script>",
    "🎉",
    "🎉 ",
    "a🎉 ",
    "www.",
    "a.",
    "a://",
    "|a",
    "\\*",
    "&amp;",
]


@pytest.mark.parametrize("unit", UNITS)
def test_thousands_of_markup_characters_neither_raise_nor_hang(unit: str) -> None:
    # Without removing stray brackets, 4096 of them take the parser two seconds; 4096 emoji took one regular expression twenty.
    normalize_text((unit * 20_000)[:20_000])


def test_deeply_nested_text_is_kept() -> None:
    assert normalize_text("> " * 500 + "word") == "word."
    assert normalize_text("- " * 500 + "word") == "word."
    assert normalize_text("[" * 500 + "word" + "]" * 500).strip("[]") == "word"


def test_the_splitter_finds_the_sentences_of_each_block() -> None:
    text = "# Plan\n\nWe go.\nThen we rest\n\n1. Pack\n2. Leave\n\n| a | b |\n|---|---|\n| c | d |"
    segments = split_text(normalize_text(text), SegmentLengths(target=1, maximum=400, first=1))
    assert [segment.strip() for segment in segments] == ["Plan.", "We go.", "Then we rest", "1. Pack.", "2. Leave.", "a, b.", "c, d."]
