"""Turn written text into plain sentences: remove what cannot be spoken (Markdown, HTML, links, emoji), keep the words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import regex
from markdown_it import MarkdownIt
from markdown_it.token import Token

# A pass can uncover new markup (an escaped asterisk, an entity), so passes repeat until nothing changes. Four were enough in all tests.
_PASSES = 4
_MAX_NESTING = 60

# What can be spoken: letters and digits of any script, and the symbols that have a spoken name.
_SPEECH = regex.compile(r"[\p{L}\p{N}%&@+°§©®×÷±√∞]|(?<!=)=(?!=)")
_MARKUP = regex.compile(r"[*_`\[\]<>&~|\\]|://|\bwww\.|(?m)^[ \t]{0,3}(?:#|[-+]\s|=|-{2,}|\d{1,9}[.)](?:\s|$))|[ ]{2}\n")

# --- Characters ---

_LINE_BREAK = regex.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028]")
# Pictures: all emoji except those with a spoken name (© ® ™, arrows), and the Unicode blocks of box drawing, dingbats and game symbols.
_PICTURE = (
    r"(?:[[\p{RI}\p{Emoji_Presentation}\p{Extended_Pictographic}\u2500-\u27BF\u2800-\u28FF\u2B00-\u2BFF\U0001F000-\U0001F0FF]"
    r"--[©®™‼⁉ℹ\u2190-\u21FF♭♮♯\u2776-\u2793]]|ℹ\uFE0F)[\uFE0E\uFE0F\u200D\U0001F3FB-\U0001F3FF\U000E0020-\U000E007F]*+"
)
_PICTURES = rf"{_PICTURE}(?:[ \t]*+{_PICTURE})*+"
_BULLET = regex.compile(r"(?m)^([ \t]*)[•‣◦▪●■□▶►➤][ \t]+")
_PICTURE_LINE = regex.compile(rf"(?m)^([ \t]*+){_PICTURES}[ \t]*+(?=\S)", flags=regex.V1)
_ANY_PICTURE = regex.compile(rf"(?<![ \t])([ \t]*+){_PICTURES}([ \t]*+)", flags=regex.V1)
_AFTER_OPENING = regex.compile(r"(?:^|\s)[*_~(\[“\"]{1,4}$")
_KEYCAP_LINE = regex.compile(r"(?m)^([ \t]*)([0-9])\uFE0F?\u20E3[ \t]*")
# Joiners belong to the spelling in Arabic and Indic scripts. All other invisible characters go.
_INVISIBLE = regex.compile(
    r"(?<=[\p{M}\p{Arabic}])[\u200C\u200D](?=\p{L})(*SKIP)(*FAIL)"
    r"|[[\p{Default_Ignorable_Code_Point}\p{Cc}\p{Cs}\p{Co}\p{Cn}\u20E3\uFFF9-\uFFFD]--[\n\t]]",
    flags=regex.V1,
)
_ASCII_INVISIBLE = re.compile(r"[\x00-\x08\x0E-\x1F\x7F]")
_SPACE = regex.compile(r"[^\S\n\t ]")
# Thirty is the most that Unicode's "stream-safe" format allows in a row. Putting more of them in order takes quadratic time.
_MARKS = regex.compile(r"(\p{M}{30})\p{M}++")

# --- Links ---

_HOST = r"[\p{Latin}\p{Greek}\p{Cyrillic}\p{Nd}_-]+(?:\.[\p{Latin}\p{Greek}\p{Cyrillic}\p{Nd}_-]+)*"
_TAIL = (
    r"(?::\d+)?(?:[/?#][^\s<>\"|\\^`{}()\[\]“”\p{Han}\p{Hiragana}\p{Katakana}，。！？]*+(?:\([^\s()<>\"]*+\)[^\s<>\"|\\^`{}()\[\]“”]*+)*+)?"
)
_URL = regex.compile(
    rf"(?i)((?<![a-z0-9])[a-z][a-z0-9+.-]{{1,15}}+://)(?:[^\s/?#@<>()\[\]]{{1,64}}+@)?({_HOST})?({_TAIL})|((?<![a-z0-9])www\.{_HOST})({_TAIL})"
)
_HOST_URL = regex.compile(rf"(?i)(?<![a-z0-9])(?:[a-z][a-z0-9+.-]{{1,15}}+://(?:www\.)?({_HOST})?(?::\d+)?/?|www\.(?=[\p{{L}}\p{{Nd}}_-]))")
_URL_END = "*_~.,;:!?'…"
_LINK_TARGET = regex.compile(r"(?i)[a-z][a-z0-9+.-]*:|[/#.]|www\.|.*(?:/|\w\.\w)")
_FOOTNOTE = regex.compile(r"\[\^[^\]\s]{1,32}\]:?")

# --- HTML ---

_TAG = regex.compile(r"</?([A-Za-z][A-Za-z0-9-]*)([^<>]*)>")
_BREAKING_NAMES = """address article aside blockquote br dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre
section summary details table tr ul"""
_FLOWING_NAMES = """a abbr b bdi bdo body big button canvas caption cite code col colgroup data del dfn em embed figcaption font head html
i iframe img input ins kbd label legend link mark meta object option picture q rp rt ruby s samp select small source span strike strong sub
sup svg tbody td template textarea tfoot th thead time title tt u var video audio wbr script style"""
_BREAKING = frozenset(_BREAKING_NAMES.split())
_FLOWING = frozenset(_FLOWING_NAMES.split())
_HIDING = regex.compile(r"(?i)<!--|<\?|<(script|style)\b")
_CLOSING = {"<!--": "-->", "<?": "?>"}

# --- Sentences ---

_ENDED = regex.compile(r"[\p{Sentence_Terminal}…:;,，；：、–—-][\p{Pe}\p{Pf}\"'’]*$")
_CJK = r"[\p{Han}\p{Hiragana}\p{Katakana}。，、！？]"
_IS_CJK = regex.compile(_CJK)
_LAST_LETTER = regex.compile(r"(?r)[\p{L}。，、！？]")  # searches from the end: a search for CJK up to the end takes quadratic time
_SOFT_BREAK = "\r"
_CJK_WRAP = regex.compile(rf"(?<={_CJK}){_SOFT_BREAK}(?={_CJK})")
_WORDS = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:['’.,:@-][\p{L}\p{M}\p{N}]+)*")
_CHECKBOX = regex.compile(r"^\[[ xX]\]\s+")
_MOST_FENCES = 3  # code blocks marked as text that are inside each other; deeper ones are read as code
_DELIMITER_ROW = regex.compile(r"(?m)^[ \t>]*+[|:-][|: \t-]*+$\n?")
_PROSE_FENCES = frozenset({"text", "txt", "plain", "plaintext", "markdown", "md"})
# Quotes and list markers nested ten deep or more: the parser would drop their content.
_DEEP = regex.compile(r"(?m)^(?:[ \t]*+>){10,}|^(?:[ \t]*+(?:[-*+]|\d{1,9}[.)])(?=[ \t])){10,}")


def _parser(*disabled: str) -> MarkdownIt:
    # Indented text is prose far more often than code, so it is kept as text.
    markdown = MarkdownIt("commonmark", {"maxNesting": _MAX_NESTING}).enable(["table", "strikethrough"])
    return markdown.disable(["code", *disabled])


_MARKDOWN = _parser()
_WITHOUT_DEFINITIONS = _parser("reference")
_INSIDE_HTML = _parser("reference", "html_block")


def has_speech(text: str) -> bool:
    """Return whether `text` contains anything to speak: a letter or digit of any script, or a symbol with a spoken name."""
    return _SPEECH.search(text) is not None


def normalize_text(text: str) -> str:
    """Return `text` as it should be spoken: paragraphs of plain sentences with blank lines between; empty if nothing can be spoken.

    - Markdown: the markup goes, the words stay. List items, headings and table rows become sentences: cells are separated by commas, and a
      full stop is added where punctuation is missing. The numbers of an ordered list stay. Text that only looks like Markdown (5 * 3,
      snake_case, #1, C#) stays as it is. The lines of a paragraph are joined.
    - Links: the text of a link is kept, the description of an image, and the host of a bare URL ("example.com").
    - Code: inline code keeps its words. Code blocks are left out unless they are marked as text or Markdown, or nothing else is left to
      speak; then their words are kept.
    - HTML: tags go, their text stays; entities become their characters.
    - Characters: emoji, drawings, control, private and invisible characters go. The result is in Unicode's normal form C.

    Every string is accepted, and a result does not change when it is normalized again.
    """
    for _ in range(_PASSES):
        normalized = _normalize_once(text)
        if normalized == text:
            break
        text = normalized
    return text if has_speech(text) else ""


def _normalize_once(text: str) -> str:
    text = _shorten_urls(_clean(text))
    if _MARKUP.search(text):
        blocks = _read_markdown(text)
    else:
        blocks = _finished([paragraph.replace("\n", _SOFT_BREAK) for paragraph in regex.split(r"\n\s*\n", text)])
    return "\n\n".join(blocks)


def _clean(text: str) -> str:
    """Remove characters that cannot be spoken. Line breaks become newlines, and pictures at the start of lines become list markers."""
    text = _LINE_BREAK.sub("\n", text).replace("\u2029", "\n\n").replace("‼", "!!").replace("⁉", "!?")
    if not text.isascii():
        text = _BULLET.sub(r"\1- ", _KEYCAP_LINE.sub(r"\1\2. ", text))
        # One picture at the start of a line is a decoration, several make a list.
        text = _PICTURE_LINE.sub(r"\1- " if len(_PICTURE_LINE.findall(text)) > 1 else r"\1", text)
        text = _ANY_PICTURE.sub(_without_picture, text)
        return unicodedata.normalize("NFC", _MARKS.sub(r"\1", _SPACE.sub(" ", _INVISIBLE.sub("", text))))
    return _ASCII_INVISIBLE.sub("", text)


def _without_picture(match: regex.Match[str]) -> str:
    """Return a space for the picture; nothing beside punctuation or Markdown, which would lose its meaning beside a space."""
    before, after = match.string[max(0, match.start() - 5) : match.start()], match.string[match.end() : match.end() + 1]
    if after and (after in ".,!?;:…。，！？" or (not match.group(2) and after in '*_~)]”"')):
        return ""
    return "" if not match.group(1) and _AFTER_OPENING.search(before) else " "


def _shorten_urls(text: str) -> str:
    """Cut the paths off URLs and link targets: the parser would take their underscores and asterisks for markup."""

    def short(match: regex.Match[str]) -> str:
        whole = match.group()
        end = whole[len(whole.rstrip(_URL_END)) :]
        # Emphasis that opens right before the URL closes after it. Other such characters at the end are part of the URL.
        opening = match.string[max(0, match.start() - 3) : match.start()]
        end = "".join(character for character in end if character not in "*_~" or character in opening)
        host: str = match.group(4) or match.group(1) + (match.group(2) or "")
        return host + end

    return _URL.sub(short, text) if _has_url(text) else text


def _has_url(text: str) -> bool:
    return "://" in text or "www." in text.lower()


def _urls_to_hosts(text: str) -> str:
    """Replace URLs by their hosts."""
    if not _has_url(text):
        return text
    spoken: str = _HOST_URL.sub(lambda match: match.group(1) or ("link" if "://" in match.group() else ""), text)
    return spoken


# --- Markdown ---


def _read_markdown(text: str, depth: int = 0) -> list[str]:
    """Return the blocks of a text that is inside `depth` code blocks."""
    text = _DEEP.sub("- ", _without_wide_tables(_without_stray_brackets(_FOOTNOTE.sub("", text))))
    env: dict[str, dict[str, dict[str, str]]] = {}
    tokens = _MARKDOWN.parse(text, env)
    targets = (definition["href"] for definition in env.get("references", {}).values())
    if not all(_LINK_TARGET.match(target) for target in targets):  # "[Anna]: yes" is a dialogue
        tokens = _WITHOUT_DEFINITIONS.parse(text)
    return _Reader(depth).read(tokens)


def _words_of_code(code: str) -> list[str]:
    return [_ended(" ".join(words)) for line in code.split("\n") if (words := _WORDS.findall(line))]


def _without_stray_brackets(text: str) -> str:
    """Remove `[` without a `]` and pairs nested deeper than ten: they are not spoken, and a thousand of them take the parser seconds."""
    open_at: list[int] = []
    drop: set[int] = set()
    for match in regex.finditer(r"[\[\]]", text):
        if match.group() == "[":
            open_at.append(match.start())
        elif open_at:
            start = open_at.pop()
            if len(open_at) >= 10:
                drop |= {start, match.start()}
    drop.update(open_at)
    return "".join(character for index, character in enumerate(text) if index not in drop) if drop else text


def _without_wide_tables(text: str) -> str:
    """Remove the rows of dashes of tables with more columns than their rows have text: the parser fills up each row, which takes seconds."""
    paragraphs = regex.split(r"(\n\s*\n)", text)
    return "".join(_DELIMITER_ROW.sub("", paragraph) if _too_wide(paragraph) else paragraph for paragraph in paragraphs)


def _too_wide(paragraph: str) -> bool:
    columns = max((row[0].count("|") for row in _DELIMITER_ROW.finditer(paragraph)), default=0)
    return columns * paragraph.count("\n") > len(paragraph)


class _Reader:
    """Collects the text to speak from the parser's tokens, block by block.

    Args:
        depth: In how many code blocks the text is.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._blocks: list[str] = []
        self._items: list[str] = []  # the numbers ("1.") of the open list items; empty once used
        self._code: list[str] = []
        self._cells: list[str] | None = None
        self._heading = False

    def read(self, tokens: Sequence[Token]) -> list[str]:
        for token in tokens:
            self._take(token)
        return _finished(self._blocks) or _words_of_code("".join(self._code))

    def _take(self, token: Token) -> None:
        if token.type == "inline":
            self._add(_inline(token.children or []))
        elif token.type in {"heading_open", "heading_close"}:
            self._heading = token.nesting == 1
        elif token.type == "list_item_open":
            self._items.append(f"{token.info}{token.markup}" if token.info else "")
        elif token.type == "list_item_close":
            self._blocks.append(self._items.pop())  # empty, unless the item had no text: "1984." alone is a text
        elif token.type == "tr_open":
            self._cells = []
        elif token.type == "tr_close":
            self._blocks.append(_ended(", ".join(cell for cell in self._cells or [] if cell)))
            self._cells = None
        elif token.type == "fence" and _PROSE_FENCES.isdisjoint(token.info.lower().split()[:1]):
            self._code.append(token.content)
        elif token.type == "fence":
            self._blocks += _read_markdown(token.content, self._depth + 1) if self._depth < _MOST_FENCES else _words_of_code(token.content)
        elif token.type == "html_block":
            self._blocks += _Reader(self._depth).read(_INSIDE_HTML.parse(_without_hidden(token.content)))

    def _add(self, text: str) -> None:
        if self._cells is not None:
            self._cells.append(" ".join(text.split()))
            return
        if self._items:
            text = _CHECKBOX.sub("", text.strip())
            if self._items[-1]:
                text = f"{self._items[-1]} {text}"
                self._items[-1] = ""
        self._blocks.append(_ended(text) if self._items or self._heading else text)


def _inline(tokens: Sequence[Token]) -> str:
    """Return the words of a line of tokens, with `\\n` for a hard line break and `\\r` for a soft one."""
    parts: list[str] = []
    link: tuple[int, str] = (0, "")
    hidden_until = _hidden_ends(tokens)
    skip_to = -1
    closed = {token.content.strip("</> ").lower() for token in tokens if token.type == "html_inline" and token.content.startswith("</")}
    for index, token in enumerate(tokens):
        if index <= skip_to:
            continue
        if token.type == "softbreak":
            parts.append(_SOFT_BREAK)
        elif token.type == "hardbreak":
            parts.append("\n")
        elif token.type == "code_inline":
            parts.append(_TAG.sub(lambda match: match.group()[1:-1].strip("/ "), token.content))
        elif token.type == "html_inline":
            skip_to = hidden_until.get(index, -1)
            parts.append(_tag_words(token.content, closed))
        elif token.type == "image":
            parts.append(_inline(token.children or []))
        elif token.type == "link_open":
            link = (len(parts), str(token.attrGet("href") or ""))
        elif token.type == "link_close" and not has_speech("".join(parts[link[0] :])):
            parts.append(link[1] if "://" in link[1] else "")
        else:
            parts.append(token.content)
    return "".join(parts)


def _hidden_ends(tokens: Sequence[Token]) -> dict[int, int]:
    """Return the index of the closing tag of each inline script and style sheet, by the index of its opening tag."""
    ends: dict[int, int] = {}
    close: dict[str, int] = {}
    for index in range(len(tokens) - 1, -1, -1):
        match = _TAG.match(tokens[index].content) if tokens[index].type == "html_inline" else None
        name = match.group(1).lower() if match else ""
        if match and name in {"script", "style"}:
            if match.group().startswith("</"):
                close[name] = index
            elif name in close:
                ends[index] = close[name]
    return ends


def _tag_words(content: str, closed: set[str]) -> str:
    """Return nothing for HTML and XML, a line break for block elements, and the words of a placeholder such as <your name>."""
    match = _TAG.fullmatch(content)
    if not match:
        return ""
    name, rest = match.group(1).lower(), match.group(2)
    if name in _BREAKING:
        return "\n"
    is_markup = name in _FLOWING or name in closed or "=" in rest or "/" in content
    return "" if is_markup else match.group(1) + rest


def _without_hidden(html: str) -> str:
    """Remove comments, scripts and style sheets."""
    kept: list[str] = []
    position = 0
    while match := _HIDING.search(html, position):
        kept.append(html[position : match.start()])
        closing = _CLOSING.get(match.group(), f"</{match.group(1)}>")
        end = html.lower().find(closing.lower(), match.end())
        if end < 0:
            return "".join(kept)
        position = end + len(closing)
    return "".join(kept) + html[position:]


# --- Blocks ---


def _ended(text: str) -> str:
    """Return `text` as a sentence: with a full stop if no punctuation ends it."""
    text = text.strip()
    if not has_speech(text) or _ENDED.search(text):
        return text
    last = _LAST_LETTER.search(text)
    return text + ("。" if last and _IS_CJK.match(last[0]) else ".")


def _finished(blocks: list[str]) -> list[str]:
    """Return the lines that contain something to speak, with single spaces and with hosts in place of URLs."""
    lines = (line for block in blocks for line in _CJK_WRAP.sub("", block).split("\n"))
    spoken = (" ".join(_urls_to_hosts(line).split()) for line in lines)
    return [line for line in spoken if has_speech(line)]
