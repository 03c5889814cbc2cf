"""How written English is read out: rules that turn numbers, symbols and abbreviations into words.

A rule is a pattern and a function from its match to the words, or to None where the match is something else. Rules are tried in the order
of `RULES`; text that one rule has read is not offered to the next. All patterns are bounded, so the time is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache

import regex

import text_english_words as table

Match = re.Match[str]  # those of `regex` have the same methods
Reader = Callable[[Match], "str | None"]
Rules = tuple[tuple[str, Reader], ...]


def _any_of(forms: Iterable[str]) -> str:
    """Return a pattern for any of `forms`, the longest first."""
    return "|".join(sorted(map(re.escape, forms), key=len, reverse=True))


# --- Numbers ---

_LONGEST_NUMBER = 36  # digits: there are words up to decillions
_CODE_LENGTH = 10
_YEAR = re.compile(r"1[1-9]\d\d|20\d\d")
_NUM = r"(?>\d{1,3}(?:,\d{3}){1,11}(?!\d)(?:\.\d{1,20})?|\d{1,12},\d{1,2}(?![\d,])|\d{1,36}(?:\.\d{1,20})?|\.\d{1,20})"
_START = r"(?<![\w.,])"
_SIGNED = rf"(?:(?<![\w)\]}}.,])[-−–](?=[\d.]))?{_NUM}"
_DASH = r"\s?[-–—−]\s?"


def cardinal(digits: str) -> str:
    """Return a whole number in words: "1234" is "one thousand two hundred and thirty four". Leading zeros are read out."""
    if len(digits) > _LONGEST_NUMBER or (digits[0] == "0" and len(digits) > 1):
        return spelled(digits)
    groups = [int(digits[max(0, end - 3) : end]) for end in range(len(digits), 0, -3)]
    words = [f"{_hundreds(group)} {table.SCALES[power]}" for power, group in enumerate(groups[1:]) if group]
    if groups[0]:
        joined = "and " if groups[0] < 100 and len(groups) == 2 else ""
        words.insert(0, joined + _hundreds(groups[0], " and "))
    return " ".join(reversed(words)) or "zero"


def _hundreds(number: int, joint: str = " ") -> str:
    """Return 1 to 999 in words, with `joint` between the hundreds and the rest."""
    hundreds, rest = divmod(number, 100)
    words = [f"{table.ONES[hundreds]} hundred"] if hundreds else []
    return joint.join([*words, _below_hundred(rest)] if rest else words)


def _below_hundred(number: int) -> str:
    if number < 20:
        return table.ONES[number]
    return table.TENS[number // 10] + (f" {table.ONES[number % 10]}" if number % 10 else "")


def _two_digits(number: int) -> str:
    """Return the second half of a year or a time: "oh five"."""
    return f"oh {table.ONES[number]}" if number < 10 else _below_hundred(number)


def spelled(digits: str) -> str:
    """Return each digit in words: "007" is "zero zero seven"."""
    return " ".join(table.ONES[int(digit)] for digit in digits)


def ordinal(digits: str) -> str:
    """Return "21" as "twenty first"."""
    head, _, last = cardinal(digits).replace(" and ", " ").rpartition(" ")
    last = table.ORDINALS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return f"{head} {last}".strip()


def year(digits: str) -> str:
    """Return a year as it is said: "1906" is "nineteen oh six", "2006" is "two thousand six", "05" is "oh five"."""
    if len(digits) == 2:
        return _two_digits(int(digits))
    first, last = int(digits[:2]), int(digits[2:])
    if digits[1:3] == "00":
        return cardinal(digits[0] + "000") + (f" {table.ONES[last]}" if last else "")
    return f"{_below_hundred(first)} {_two_digits(last) if last else 'hundred'}"


def number(text: str) -> str:
    """Return a number in words: "1,234.50", ".5", "-3", "1,5" (a decimal comma), "007"."""
    plain = text.lstrip("-−–+")
    if re.fullmatch(r"\d+,(?:\d{1,2}|\d{4,})", plain):
        plain = plain.replace(",", ".")
    whole, _, decimals = plain.replace(",", "").partition(".")
    # Ten digits or more without commas are a code: an account, a card, an article.
    is_code = "," not in plain and len(whole) >= _CODE_LENGTH
    words = ["minus"] if text[0] in "-−–" else []
    words += [spelled(whole) if is_code else cardinal(whole)] if whole else []
    words += ["point", spelled(decimals)] if decimals else []
    return " ".join(words)


def _number_or_year(text: str) -> str:
    """Return four digits from 1100 to 2099 in pairs, other numbers as counts."""
    return year(text) if _YEAR.fullmatch(text) else number(text)


def _round(amount: str) -> str:
    """Return a number before "million" and the like, which is said without "and"."""
    return number(amount).replace(" and ", " ")


def _is_one(text: str) -> bool:
    return text.replace(",", "").lstrip("-−–") in ("1", "1.0", "1.00")


def _counted(amount: str, one: str, many: str) -> str:
    return f"{number(amount)} {one if _is_one(amount) else many}"


def fraction(top: str, bottom: str) -> str:
    """Return "3", "4" as "three quarters"."""
    if bottom == "1":
        return f"{cardinal(top).replace(' and ', ' ')} over one"
    one, many = {"2": ("half", "halves"), "4": ("quarter", "quarters")}.get(bottom) or (ordinal(bottom), f"{ordinal(bottom)}s")
    return f"{cardinal(top).replace(' and ', ' ')} {one if top == '1' else many}"


def roman(text: str) -> str:
    """Return a Roman numeral's value in digits."""
    values = [_ROMAN_VALUES[letter] for letter in text]
    return str(sum(-value if value < later else value for value, later in zip(values, [*values[1:], 0], strict=True)))


_ROMAN_VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
_ROMAN = r"(?=[LCDM]*[IVX])(M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3}))"


def house_number(digits: str) -> str:
    """Return a house number as it is said: "1428" is "fourteen twenty eight", "708" "seven oh eight"."""
    if len(digits) == 4 and digits[1:] != "000":
        return year(digits) if digits[2:] != "00" else f"{_below_hundred(int(digits[:2]))} hundred"
    if len(digits) == 3 and digits[1:] != "00":
        return f"{table.ONES[int(digits[0])]} {_two_digits(int(digits[1:]))}"
    return spelled(digits) if len(digits) == 5 or digits[0] == "0" else cardinal(digits)


# --- Sentences ---

_NEXT_SENTENCE = re.compile(r"[\"'”’)\]]*(?:\s*$|\s+[\"“‘(]?[A-Z])")
_STARTER = re.compile(
    r"(?:It|He|She|They|We|You|I|The|A|An|This|That|These|Those|There|Then|But|And|So|In|On|At|If|When|What|Who|Why|How|My|Our|His|Her)\b"
)
_STARTER_OR_END = re.compile(rf"[ \n\t\"'”’)]*$|\s*{_STARTER.pattern}")


def _stopped(words: str, match: Match) -> str:
    """Return `words`, with a full stop if the match ends with one that ends the sentence too."""
    return words + "." if match[0].endswith(".") and _NEXT_SENTENCE.match(match.string, match.end()) else words


def _stopped_before_starter(words: str, match: Match) -> str:
    """Return `words` as `_stopped`, for abbreviations that often stand before a name: a capital alone does not end the sentence."""
    return words + "." if match[0].endswith(".") and _STARTER_OR_END.match(match.string, match.end()) else words


# --- Calendar ---

_MONTHS = {name[:3]: name for name in table.MONTH_NAMES}
_WEEKDAYS = {name[:3]: name for name in table.WEEKDAY_NAMES}
_MONTH = rf"(?i:({'|'.join(table.MONTH_NAMES)}|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)"
_SHORT_WEEKDAY = r"Mon|Tues?|Weds?|Thu(?:rs?)?|Fri|Sat|Sun"
_WEEKDAY = rf"(?:({_SHORT_WEEKDAY})\b\.?,? )?"
_DAY = r"(0?[1-9]|[12]\d|3[01])"
_DAYS = rf"{_DAY}(?:st|nd|rd|th)?(?:\s?[-–—]\s?{_DAY}(?:st|nd|rd|th)?)?"
_OF_YEAR = r"(?:(,? |-)(\d{4}))?"
_DECADE = r"(1[1-9]|20)?(\d)0(?:['’]|(?<=\d{4})\s)?s"


def _month(text: str) -> str:
    return _MONTHS[text[:3].capitalize()]


def _weekday(text: str | None) -> str:
    return f"{_WEEKDAYS[text[:3]]}, " if text else ""


def _day(text: str) -> str:
    return ordinal(text.lstrip("0"))


def _in_year(comma: str | None, digits: str | None) -> str:
    return f"{', ' if comma and ',' in comma else ' '}{year(digits)}" if digits else ""


def _numeric_date(match: Match) -> str | None:
    """Return a date in digits: the year first, or the month first unless it is above 12."""
    first, _, second, third = match.groups()
    if len(first) == 4:
        return _date(second, third, first)
    if int(first) > 12:
        words = _date(second, first, third)
        return words and f"the {_day(first)} of {table.MONTH_NAMES[int(second) - 1]}, {year(third)}"
    return _date(first, second, third)


def _date(month: str, day: str, digits: str) -> str | None:
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return None
    return f"{table.MONTH_NAMES[int(month) - 1]} {_day(day)}, {year(digits)}"


def _month_day(match: Match) -> str | None:
    weekday, month, day, last, comma, digits = match.groups()
    if month in _VERBS and not digits:
        return None  # "I may 5 times", "they march 10 miles"
    return f"{_weekday(weekday)}{_month(month)} {_day(day)}{f' to {_day(last)}' if last else ''}{_in_year(comma, digits)}"


def _day_month(match: Match) -> str | None:
    weekday, the, day, last, month, comma, digits = match.groups()
    if month in _VERBS and not digits and f"{last or day} {month}" in match[0]:
        return None  # "children aged 5-9 may come"
    days = _day(day) + (f" to the {_day(last)}" if last else "")
    return f"{the or ''}{_weekday(weekday)}{'' if the else 'the '}{days} of {_month(month)}{_in_year(comma, digits)}"


_VERBS = ("may", "march", "mar")


def _decades(match: Match) -> str | None:
    first, last = _decade(match[1], match[2]), match[4] and _decade(match[3], match[4])
    return f"{first} to {last}" if first and last else first


def _decade(century: str | None, tens: str) -> str | None:
    if century and tens == "0":
        return cardinal(f"{century[0]}000") + "s" if century == "20" else f"{_below_hundred(int(century))} hundreds"
    if tens == "0":
        return None
    plural = "tens" if tens == "1" else f"{table.TENS[int(tens)][:-1]}ies"
    return f"{_below_hundred(int(century))} {plural}" if century else plural


def _era(match: Match) -> str:
    digits = match[1].replace(",", "")
    words = (
        f"{table.ONES[int(digits[0])]} {_below_hundred(int(digits[1:]))}"
        if len(digits) == 3 and digits[1] != "0"
        else _number_or_year(digits)
    )
    return _stopped(f"{words} {match[2].replace('.', '')}", match)


def _quarter(match: Match) -> str:
    digits = match[3] if len(match[3]) == 4 else f"20{match[3]}"
    return f"the {table.QUARTERS[int(match[1] or match[2]) - 1]} quarter of {year(digits)}"


# --- Clock ---

_HALF = r"([AaPp])\.?[Mm]\b\.?"
_HOUR = r"([01]?\d|2[0-4])"
_CLOCK = rf"{_HOUR}(?:[:.]([0-5]\d))?"
_ZONE = r"(?:\s?((?i:EST|EDT|CST|CDT|MST|MDT|PST|PDT|GMT|UTC|CET|CEST|BST|E\.S\.T|P\.S\.T|ET|PT)\b))?"


def _clock(hour: str, minute: str | None, half: str | None) -> str:
    words = cardinal(str(int(hour)))
    if minute and minute != "00":
        words += f" {_two_digits(int(minute))}"
    elif minute and not half:
        words += " hundred hours" if hour in ("00", "24") else " o'clock"
    return words + (f" {half.upper()}M" if half else "")


def _clock_time(match: Match) -> str:
    hour, minute, half, zone = match.groups()
    words = _clock(hour, minute, half)
    return f"{words} {zone.replace('.', '').upper()}" if zone else _stopped(words, match)


def _clock_range(match: Match) -> str | None:
    hour, minute, half, last_hour, last_minute, last_half = match.groups()
    if not (half or last_half or (minute and last_minute)):
        return None
    return _stopped(f"{_clock(hour, minute, half)} to {_clock(last_hour, last_minute, last_half)}", match)


def _clock_seconds(match: Match) -> str:
    half = f" {match[4].upper()}M" if match[4] else ""
    return _stopped(_duration(match) + half, match)


def _duration(match: Match) -> str:
    """Return the hours, minutes and seconds of the first three groups."""
    parts = [_counted(str(int(match[at])), name, f"{name}s") for at, name in enumerate(("hour", "minute", "second"), 1) if match[at]]
    return " and ".join([" ".join(parts[:-1]), parts[-1]])


# --- Money ---

_MAGNITUDE = rf"(?:\s?((?i:{_any_of(table.MAGNITUDES)}))\b)?"
_PER = rf"(?:/({_any_of(table.PERIODS)})\b)?"
_MONEY_SIGN = rf"[{''.join(name for name in table.CURRENCIES if len(name) == 1)}]"
_MONEY_CODE = rf"(?:{_any_of([*table.CODES, *(name for name in table.CURRENCIES if len(name) > 1)])})\b"
_CURRENCY = rf"(?:({_any_of(table.DOLLARS)})(?=\$))?({_MONEY_SIGN}|\b{_MONEY_CODE}\.?)"
_MINUS = r"(?:(?<![\w)\]}])([-−–]))?"
_ARTICLE = re.compile(r"\b[Aa]n? $")
_NOUN = re.compile(r" (?!(?:of|per|and|or|in|for|on|at|to|from|by|is|was|a|an|the|each|every|more|less)\b)[a-z]{3}")


def _amount(name: str, amount: str, magnitude: str | None, country: str | None = None) -> str:
    """Return an amount of money in words: two decimals are cents, more are read out."""
    code = name.rstrip(".")
    if code == "€" and re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", amount):
        amount = amount.replace(".", "")  # "€1.000", as it is written where it is paid
    one, many, cent, cents = table.CURRENCIES[table.CODES.get(code, code)].split("/")
    prefix = f"{table.DOLLARS[country]} " if country else ""
    if magnitude:
        return f"{_round(amount)} {table.MAGNITUDES[magnitude.lower()]} {prefix}{many}"
    whole, _, decimals = amount.replace(",", "").partition(".")
    decimals = decimals.rstrip("0").ljust(2, "0")
    if len(decimals) > 2:
        return f"{number((whole and (whole.lstrip('0') or '0')) + '.' + decimals)} {prefix}{many}"
    parts = []
    if int(whole or 0) or not int(decimals):
        parts.append(f"{cardinal(whole or '0')} {prefix}{one if _is_one(whole) else many}")
    if int(decimals):
        parts.append(_counted(str(int(decimals)), cent, cents))
    return " ".join(parts)


def _money(match: Match) -> str:
    minus, country, name, inner, amount, magnitude, last_name, last, last_magnitude, period = match.groups()
    if last:
        shared = last_magnitude and not magnitude and float(amount.replace(",", "")) < float(last.replace(",", ""))
        is_money = (last_name or magnitude or "." in amount) and not shared
        first = _amount(name, amount, magnitude, country) if is_money else number(amount)
        words = f"{first} to {_amount(name, last, last_magnitude, country)}"
    else:
        words = _attributive(_amount(name, amount, magnitude, country), match)
    return ("minus " if minus or inner else "") + words + _per(period)


def _money_after(match: Match) -> str:
    minus, first, amount, magnitude, name, period = match.groups()
    if re.fullmatch(r"\d+,\d{1,2}", amount):
        amount = amount.replace(",", ".")
    return f"{'minus ' if minus else ''}{f'{number(first)} to ' if first else ''}{_amount(name, amount, magnitude)}{_per(period)}"


def _per(period: str | None) -> str:
    return f" per {table.PERIODS[period]}" if period else ""


def _attributive(words: str, match: Match) -> str:
    """Return an amount or measure in the singular where it describes a noun: "a $500 fine", "a 90° turn"."""
    if not (_ARTICLE.search(match.string, max(0, match.start() - 3), match.start()) and _NOUN.match(match.string, match.end())):
        return words
    for many, one in table.ATTRIBUTES.items():
        words = words.replace(many, one)
    return words


# --- Measures ---

_SPACED = frozenset("sKNJ")  # letters that name something else right after a number: "4s", "5K"
_UNIT = f"(?:{_any_of(table.UNITS)})"
_POWERS = {"²": "square ", "2": "square ", "³": "cubic ", "3": "cubic ", "^2": "square ", "^3": "cubic ", "": ""}
_MEASURE = rf"({_UNIT})(²|³|\^?[23])?(?:/({_UNIT}|yr|year|day|week|month|person|d|wk|mo)(²|³)?)?(?![\w²³])\.?"
_BIG = r"(?:\s((?i:hundred|thousand|million|billion|trillion)))?"
_AFTER_INCHES = re.compile(r"\s*(?:$|[,;)x×])|\s+(?:tall|wide|long|high|thick|deep)\b")


def _plural(name: str) -> str:
    """Return the plural of a unit: the first word of "mile per hour", the last of "square foot", "degree" of "degree Celsius"."""
    if name.startswith("degree"):
        return name.replace("degree", "degrees")
    head, per, tail = name.partition(" per ")
    first, space, last = head.rpartition(" ")
    return f"{first}{space}{table.IRREGULAR.get(last, last + 's')}{per}{tail}"


def _unit_names(match: Match, at: int) -> tuple[str, str]:
    """Return the singular and plural of the unit whose groups begin at `at`."""
    unit, power, per, per_power = (match[group] or "" for group in range(at, at + 4))
    one = _POWERS[power] + table.UNITS[unit]
    suffix = f" per {_POWERS[per_power]}{table.UNITS.get(per) or table.PERIODS[per]}" if per else ""
    return one + suffix, _plural(one) + suffix


def _is_unit(match: Match, at: int) -> bool:
    """Whether letters that could be a word or a name are a unit here."""
    unit = match[at]
    if unit == "in":
        return match[0].endswith(".") or _AFTER_INCHES.match(match.string, match.end()) is not None
    return not (match.string[match.start(at) - 1].isdigit() and unit in _SPACED and not match[at + 2])


def _measure(match: Match) -> str | None:
    amount, big = match[1], match[2]
    if not _is_unit(match, 3):
        return None
    one, many = _unit_names(match, 3)
    words = f"{_round(amount)} {big} {many}" if big else _counted(amount, one, many)
    return _stopped(_attributive(words, match), match)


def _measure_range(match: Match) -> str | None:
    first, first_unit, last = match[1], match[2], match[3]
    if not _is_unit(match, 4):
        return None
    words = number(first) + (f" {_plural(table.UNITS[first_unit])}" if first_unit else "")
    return _stopped(f"{words} to {number(last)} {_unit_names(match, 4)[1]}", match)


def _adjective(match: Match) -> str:
    """Return "a 4-kilogram bag" with the unit as it is written."""
    return f"{number(match[1])} {table.UNITS.get(match[2], match[2])}"


def _dimensions(match: Match) -> str | None:
    if match[2] and not _is_unit(match, 2):
        return None
    parts = re.split(r"\s?[x×]\s?", match[1])
    words = " by ".join(house_number(part) if part.isdigit() else number(part) for part in parts)
    return _stopped(f"{words} {_unit_names(match, 2)[1]}" if match[2] else words, match)


def _feet_by_feet(match: Match) -> str:
    names = ("foot", "feet") if match[2] in "'′" else ("inch", "inches")
    return f"{_counted(match[1], *names)} by {_counted(match[3], *names)}"


def _inches(match: Match) -> str | None:
    if match[0].endswith('"') and match.string.count('"', 0, match.start()) % 2:
        return None  # it closes a quotation
    return _counted(match[1], "inch", "inches")


def _feet(match: Match) -> str | None:
    if match[0].endswith("'") and match.string.count("'", 0, match.start()):
        return None
    return (f"{number(match[1])} to " if match[1] else "") + _counted(match[2], "foot", "feet")


def _fraction(match: Match) -> str | None:
    whole, top, bottom, unit = match[1], match[2], match[3], match[4]
    if bottom.strip("0") == "" or top[0] == "0":
        return None
    if _YEAR.fullmatch(top) and len(bottom) == 2 and not whole and not unit:
        return f"{year(top)} {year(bottom)}"
    if (top == bottom or (bottom == "100" and len(top) > 1)) and not whole and not unit:
        return f"{cardinal(top)} out of {cardinal(bottom)}"
    return _mixed(match, fraction(top, bottom), 4)


def _fraction_sign(match: Match) -> str:
    return _mixed(match, _sign_fraction(match[2]), 3)


def _sign_fraction(sign: str) -> str:
    return fraction(*unicodedata.normalize("NFKC", sign).split("\u2044"))


def _mixed(match: Match, part: str, unit_at: int) -> str:
    """Return the whole number, if there is one, and a part of one, with the unit after them, whose groups begin at `unit_at`."""
    words = f"{number(match[1])} and {'a half' if part == 'one half' else part}" if match[1] else part
    if not match[unit_at]:
        return words
    one, many = _unit_names(match, unit_at)
    return _stopped(f"{words} {many if match[1] else one}", match)


# --- Arithmetic ---

_FRACTION_SIGNS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_OPERAND = rf"(?:(?:[-−]?{_NUM}|[A-Za-zπ])(?:[²³]|\^[23])?|[a-z]{{2}}(?:[²³]|\^[23]))"
_RELATION = r"(?:[=≠≈≥≤<>]|[<>!=]=)"
_MORE_OPERANDS = rf"(?: ?[-−–+*×x·÷/±^=] ?{_OPERAND}){{0,12}}(?![\w^²³])"
_EQUATION_PART = re.compile(rf"({_NUM}|[A-Za-zπ]+)([²³]|\^[23])?|(>=|<=|!=|==|[-−–+*×x·÷/=≠≈≥≤<>±^])|\s+")


def _equation(match: Match) -> str:
    words, expect_operand = [], True
    for part in _EQUATION_PART.finditer(match[0]):
        if part[3] or (part[1] == "x" and not expect_operand):
            words.append("minus" if expect_operand else table.OPERATORS[part[0]])
            expect_operand = True
        elif part[1]:
            words.append(number(part[1]) if part[1][0] in "0123456789." else table.SYMBOLS.get(part[1], part[1]))
            words += [_to_the(part[2])] if part[2] else []
            expect_operand = False
    return " ".join(words)


def _relation(match: Match) -> str:
    has_verb = match.string.endswith(("is ", "are ", "was ", "were "), 0, match.start())
    return table.OPERATORS[match[0]].removeprefix("is " if has_verb else "")


def _power(match: Match) -> str:
    return f"{number(match[1]) if match[1][0].isdigit() else match[1]} {_to_the(match[2])}"


def _to_the(exponent: str) -> str:
    exponent = exponent.translate(_SUPERSCRIPTS).lstrip("^")
    if exponent in ("2", "3"):
        return "squared" if exponent == "2" else "cubed"
    if exponent.startswith("-"):
        return f"to the minus {cardinal(exponent[1:])}"
    return f"to the {ordinal(exponent)}" if len(exponent) < 3 else f"to the power of {cardinal(exponent)}"


def _scientific(match: Match) -> str:
    exponent = match[2].lstrip("+")
    power = f"minus {cardinal(exponent[1:])}" if exponent[0] in "-−" else ordinal(exponent)
    return f"{number(match[1])} times ten to the {power}"


def _root(match: Match) -> str:
    return f"the {table.ROOTS[match[1]]} root of {number(match[2]) if match[2][0] in '0123456789.' else match[2]}"


def signs() -> dict[str, str]:
    """Return the words for each sign that the rules read by itself."""
    fractions = {sign: _sign_fraction(sign) for sign in _FRACTION_SIGNS}
    return table.SYMBOLS | fractions | {form: words for form, words in table.LITERALS.items() if len(form) == 1}


# --- Telephone numbers, versions, addresses ---

_STREET_WORDS = (
    rf"((?:(?:[NSEW]{{1,2}}\.? )?(?:[A-Z][A-Za-z'’]{{1,20}}|\d{{1,3}}(?:st|nd|rd|th)) ){{1,3}}?)({'|'.join(table.STREETS)}|st|hwy)\b\.?"
)


_TOWN = re.compile(r"(?:\b(?:in|to|from|of|near|at|for)|\d[\w.,'’ ]{3,50}) (?:[A-Z][\w.'’]* ){0,2}[A-Z]['’A-Z]?[a-z][\w.'’]*, $")


def _digits(match: Match) -> str:
    return _groups(match[0])


def _groups(text: str) -> str:
    return ", ".join(spelled(group) for group in re.findall(r"\d+", text))


def _phone(match: Match) -> str:
    country, rest, extension = match[1], match[2], match[3]
    if country and country.strip("+-. (") == "1" and "800" in rest[:5]:
        words = f"one, eight hundred, {_groups(rest.replace('800', '', 1))}"
    else:
        words = (f"{'plus ' if '+' in country else ''}{_groups(country)}, " if country else "") + _groups(rest)
    return words + (f", extension {spelled(extension)}" if extension else "")


def _ip_address(match: Match) -> str:
    words = " dot ".join(spelled(group) for group in match[1].split("."))
    words += f" slash {cardinal(match[3])}" if match[3] else ""
    return words + (f" port {spelled(match[2])}" if match[2] else "")


def _version(match: Match) -> str:
    name, digits, suffix, last = match.groups()
    words = " point ".join(cardinal(part) for part in digits.split("."))
    name = "version" if name in ("v", "V") else name
    return " ".join(filter(None, [name, words, suffix and suffix.strip("-."), last and cardinal(last)]))


def _address(match: Match) -> str:
    digits, letter, names, street = match.groups()
    parts = [house_number(digits), letter]
    for word in names.split():
        numbered = re.fullmatch(r"(\d+)(?:st|nd|rd|th)", word)
        parts.append(ordinal(numbered[1]) if numbered else table.COMPASS.get(word.rstrip("."), word))
    return _stopped(" ".join(filter(None, [*parts, table.STREETS[street.capitalize()]])), match)


def _state(match: Match) -> str | None:
    """Return the state after a town; what is a word too needs a ZIP code or words that lead to a place: "Well, OK"."""
    is_sure = match[1] not in table.STATES_TOO or match[2] or _TOWN.search(match.string, max(0, match.start() - 80), match.start())
    if not is_sure:
        return None
    return table.STATES[match[1]] + (f" {_groups(match[2])}" if match[2] else "")


def _times(match: Match) -> str:
    words = f"{number(match[1])} to {number(match[2])}" if match[1] else number(match[2])
    return f"{words} {'times' if _COMPARED.match(match.string, match.end()) else 'x'}"


_COMPARED = re.compile(
    r" (?:faster|slower|more|less|better|bigger|larger|smaller|cheaper|higher|lower|the|as|a|yours?|mine|his|hers|ours|theirs|my|that|this|what)\b"
)


def _code(match: Match) -> str:
    return f"{match[1]}{' '.join(spelled(part) if part.isdigit() else part for part in re.findall(r'[0-9]+|[A-Za-z]+', match[2]))}"


def _letters_and_number(match: Match) -> str | None:
    return None if match[1] == "I" else f"{match[1]} {house_number(match[2])}"


# --- Abbreviations ---

_AFTER_NAME = re.compile(r"[A-Z][a-z]+ $")
_NO_NAME = re.compile(rf"[a-z]|{_STARTER.pattern}")
# What may be short for something before a full stop or a hyphen; `\b[A-Z]` is an initial.
ABBREVIATED = rf"[A-Z]|{_any_of([*table.TITLES, *table.ABBREVIATIONS, *table.STREETS])}|{_SHORT_WEEKDAY}|(?i:{_any_of(table.NUMBERED)})"


def _title(match: Match) -> str | None:
    """Return a title before a name; "Elm St. It" ends a sentence, and has none."""
    is_street = match[1] in ("St", "Dr", "Mt", "Ft") and _AFTER_NAME.search(match.string, max(0, match.start() - 24), match.start())
    return None if is_street and _NO_NAME.match(match.string, match.end()) else f"{table.TITLES[match[1]]} "


def _street(match: Match) -> str:
    name = f"{ordinal(match[1][:-3])} " if match[1][0].isdigit() else match[1]
    return name + _stopped(table.STREETS[match[2]], match)


def _numbered(match: Match) -> str:
    spoken = table.NUMBERED[match[1].lower()]
    return f"{spoken.capitalize() if match[1][0].isupper() else spoken} "


def _phrase(match: Match) -> str:
    return table.PHRASES[match[1]] if match[1].lower() in ("i.e.", "e.g.") else _stopped_before_starter(table.PHRASES[match[1]], match)


def _initial(match: Match) -> str | None:
    return None if _STARTER.match(match.string, match.end() + 1) else match[1]


# --- Roman numerals ---

# What follows a numeral I; otherwise it is the pronoun: "the part I like".
_AFTER_FIRST = re.compile(
    r"(?i)\s*(?:$|[^\w\s'’])|\s+(?:of|and|or|to|in|by|we|error|errors|trial|trials|cancer|study|studies|became|ruled|died|reigned|begins|ends|"
    r"covers|(?:is|was) (?:an?|the|king|queen|crowned|born|about|on))\b"
)
_RULER = re.compile(r"\b(?:King|Queen|Pope|Emperor|Tsar) $")
_INITIAL = re.compile(rf"\.\s+(?!{_STARTER.pattern})[A-Z]")


def _is_numeral(match: Match) -> bool:
    """Whether the letters are a numeral: neither a pronoun nor the initial of a name."""
    is_sure = match[2] != "I" or match[1] == "War" or _RULER.search(match.string, max(0, match.start() - 10), match.start())
    if not is_sure and not _AFTER_FIRST.match(match.string, match.end()):
        return False
    return len(match[2]) > 1 or not _INITIAL.match(match.string, match.end())


def _part(match: Match) -> str | None:
    return f"{match[1]} {cardinal(roman(match[2]))}" if _is_numeral(match) else None


def _reign(match: Match) -> str | None:
    return f"{match[1]} the {ordinal(roman(match[2]))}" if _is_numeral(match) else None


# --- Names of files, hosts and mailboxes ---

_NAME_PART = re.compile(r"\d+|[^\W\d_]+|[^\w]|_")
_VOWEL = re.compile(r"[aeiouyAEIOUY]")


def spell_name(name: str, *, separators: bool = True) -> str:
    """Return a name of a file, host or mailbox: digits one by one, signs by name, short capitals as letters."""
    words = []
    parts = _NAME_PART.findall(name)
    for before, part in zip(["", *parts], parts, strict=False):
        if part[0].isdigit():
            words.append(_digits_in_name(part, name))
        elif part in table.SIGNS_IN_NAMES:
            words += [table.SIGNS_IN_NAMES[part]] if separators or part == "." else []
        elif before == "." and part.lower() in table.SUFFIXES:
            words.append(table.SUFFIXES[part.lower()])
        else:
            words.append(part.upper() if not _VOWEL.search(part) and len(part) < 6 else part)
    return " ".join(words)


def _digits_in_name(digits: str, name: str) -> str:
    is_round = re.fullmatch(r"[1-9]\d?00+", digits) is not None
    return cardinal(digits) if is_round or (len(digits) == 2 and digits[0] != "0" and "/" not in name) else spelled(digits)


def _unknown_host(match: Match) -> str | None:
    """Return a name like "news.abc"; a common word after the full stop starts a sentence that lacks its space."""
    return None if match[0].rpartition(".")[2].upper() in table.COMMON else spell_name(match[0])


def _hashtag(match: Match) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", match[1])
    return f"hashtag {re.sub('[0-9]+', lambda digits: f' {_number_or_year(digits[0])} ', words)}".strip()


# --- Other numbers ---

# A plural noun after four digits: "1500 people", "1234 files" are counts.
_COUNTED_NOUN = re.compile(r"\s+(?!was\b|is\b|has\b|does\b|its\b|this\b|as\b|us\b|yes\b)(?:people|men|women|children|[a-z]{3,}(?<!s)s)\b")


def _ordinal(match: Match) -> str | None:
    digits, suffix = match[1].replace(",", ""), match[2].lower()
    right = "th" if digits[-2:-1] == "1" else {"1": "st", "2": "nd", "3": "rd"}.get(digits[-1], "th")
    return ordinal(digits) if suffix == right else None


def _range(match: Match) -> str:
    first, last = match[1], match[2]
    if _YEAR.fullmatch(first) and (_YEAR.fullmatch(last) or len(last) == 2):
        return f"{year(first)} to {year(last)}"
    if float(first.replace(",", "")) > float(last.replace(",", "")) and (" " in match[0] or len(first) > 2):
        return f"{number(first)} {'minus ' if ' ' in match[0] else ''}{number(last)}"
    return f"{number(first)} to {number(last)}"


def _scaled(match: Match) -> str:
    if match[2] == "K" and len(match[1]) == 1:
        return f"{number(match[1])} K"  # a screen, a race
    return f"{_round(match[1])} {table.MAGNITUDES[match[2].lower()]}"


def _plain_number(match: Match) -> str:
    return number(match[0]) if _COUNTED_NOUN.match(match.string, match.end()) else _number_or_year(match[0])


def _letters_and_digits(match: Match) -> str:
    """Return "GPT-4o" as "GPT four O". The grammar reads such names too, but takes up to 50 ms for each."""
    parts = re.findall(r"[A-Za-z]+|\d+", match[0])
    return " ".join(_digits_in_code(part) if part.isdigit() else part if len(part) > 1 else part.upper() for part in parts)


def _digits_in_code(digits: str) -> str:
    if len(digits) > 4 or digits[0] == "0":
        return spelled(digits)
    return house_number(digits) if len(digits) == 4 else cardinal(digits).replace(" and ", " ")


def _last_digits(match: Match) -> str:
    return _number_or_year(match[0]) if len(match[0]) <= _LONGEST_NUMBER else spelled(match[0])


# --- Capitals ---

_CAPITALS = r"[A-Z][A-Z'’]*"
_AROUND = 40


def _shouted(match: Match) -> str | None:
    """Return words written in capitals in lower case; acronyms among them stay."""
    words = re.findall(_CAPITALS, match[0])
    if not any(len(word) > 1 and word in table.COMMON for word in words):
        return None
    return re.sub(_CAPITALS, lambda word: _lowered(word[0]), match[0])


def _capitals(match: Match) -> str | None:
    """Return a word between numbers and signs of a text in capitals, as `_shouted`."""
    around = match.string[max(0, match.start() - _AROUND) : match.end() + _AROUND]
    words = re.findall(_CAPITALS, around)
    return _lowered(match[0]) if around.isupper() and len(words) > 3 and not table.COMMON.isdisjoint(words) else None


def _lowered(word: str) -> str:
    keeps = word == "I" or (word in table.ACRONYMS and word not in table.ALSO_WORDS) or not _VOWEL.search(word)
    return word if keeps else word.lower()


# --- The rules ---


@cache
def compiled(rules: Rules) -> list[tuple[regex.Pattern[str], Reader]]:
    """Return rules with their patterns compiled, which takes 0.1 s: not at import, because `say` with a server needs none."""
    return [(regex.compile(pattern), reader) for pattern, reader in rules]


def _always(words: str) -> Reader:
    return lambda _match: words


def _from(words: dict[str, str]) -> Reader:
    return lambda match: words[match[0]]


# Patterns in the order they are tried. `(?|…|…)` numbers the groups of each alternative anew.
RULES: Rules = (
    (rf"(?<![\w/.])(?:{_any_of(table.LITERALS)})(?![\w/])", _from(table.LITERALS)),
    (r"(?<![\w/.])([A-G])#(?![\w/])", lambda match: f"{match[1]} sharp"),
    (r"(?<![\w$])\$([A-Za-z])\$(?![\w$])", lambda match: match[1]),  # a variable in TeX
    # names
    (r"(?<![\w+&-])[\w+-][\w.+&-]{0,63}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}\b(?!/)", lambda match: spell_name(match[0])),
    (
        rf"(?<![\w@./-])[A-Za-z0-9][\w-]{{0,63}}+(?:[./][A-Za-z0-9_][\w-]{{0,63}}+){{0,6}}\.(?:{_any_of(table.EXTENSIONS)})(?![\w/]|\.\w)",
        lambda match: spell_name(match[0]),
    ),
    (rf"(?<![\w@./:-])(?:[A-Za-z0-9][A-Za-z0-9-]{{0,62}}\.){{1,4}}(?:{table.TLD})\b(?![\w/@]|\.[\w])", lambda match: spell_name(match[0])),
    (r"(?<![\w.@/-])[a-z][a-z0-9]{2,30}\.[a-z]{2,4}(?![\w./@])", _unknown_host),
    (r"(?<![\w@/])@([A-Za-z_]\w{0,40})", lambda match: f"at {spell_name(match[1], separators=False)}"),
    (r"(?<![\w&#/])#([A-Za-z]\w{0,60})(?![\w#$])", _hashtag),
    (r"(?<!\w)[A-Za-z]{2,10}://[\w.~:/?#@!$&'()*+,;=%-]{1,200}[\w/]", lambda match: spell_name(match[0])),
    (r"(?<![\w@.])(?:[\w-]{1,60}\.){1,4}[a-z]{2,12}/[\w.~:/%-]{0,200}[\w/]", lambda match: spell_name(match[0])),
    (r"</?[A-Za-z][\w-]{0,30}(?:=[^\s<>]{0,30})? ?/?>", lambda match: match[0]),  # only text that was not cleaned up has tags
    # telephone numbers, codes, addresses on a network
    (
        r"(?<![\w.-])(\+?1[-. ]?\s?)?(\(\d{3}\)\s?-?\s?\d{3}[-. ]\d{4}|\d{3}-\d{3}-\d{4}(?:-\d{1,4})?|\d{3}\.\d{3}\.\d{4}|\d{3} \d{3}[- ]\d{4}|"
        r"800-\d{3}-\d{4})(?:,? (?:ext\.?|x) ?(\d{1,6}))?(?![\w-]|[.]\d)",
        _phone,
    ),
    (r"(?<![\w.])\+\d{1,3}(?:[ .-]\(?\d{1,5}\)?){2,6}(?![\w-])", lambda match: f"plus {_groups(match[0])}"),
    (r"(?<![\w.-])(?:\d{3}-(?:\d\d-)?\d{4}|\d{4}(?:[ -]\d{4}){3}|(?<=ISBN:? )[\d-]{10,17})(?![\w-]|[.]\d)", _digits),
    (r"(?<=[Cc]all )[2-9]11\b|(?<=[Dd]ial )[1-9]\d\d\b|(?<=ZIP )\d{5}\b|(?<=ZIP code )\d{5}\b|(?<=[a-z]{3} )\d{5}-\d{4}\b", _digits),
    (r"(?<![\w.])(\d{1,3}(?:\.\d{1,3}){3})(?::(\d{1,5}))?(?:/(\d{1,2}))?(?![\w]|\.\d)", _ip_address),
    # dates
    (rf"{_START}(\d{{4}})([-/.])(0?[1-9]|1[0-2])\2{_DAY}(?![\w/-])", _numeric_date),
    (r"(?<![\w/.-])(\d{1,2})([/.-])(\d{1,2})\2((?:1[5-9]|20)\d\d|(?<=/)\d\d)(?![\w/-]|[.]\d)", _numeric_date),
    (rf"\b{_WEEKDAY}{_MONTH}[ -]{_DAYS}{_OF_YEAR}(?![\w:%]|[.,/]\d|-\d)", _month_day),
    (rf"\b{_WEEKDAY}([Tt]he )?{_DAYS}(?: of)?[ -]{_MONTH}{_OF_YEAR}(?!\w)", _day_month),
    (rf"\b{_MONTH}(,? )(\d{{4}})(?![\w:%]|[.,]\d)", lambda match: f"{_month(match[1])}{_in_year(match[2], match[3])}"),
    (r"\b(?:Q([1-4])[ ,']{0,2}|([1-4])Q)(\d{4}|\d\d)\b", _quarter),
    (rf"(?<![\w,.])['’‘]?{_DECADE}(?:[-–]{_DECADE})?\b", _decades),
    (r"(?<=\b(?i:pre|post|mid|late|early)-)(?:1[1-9]|20)\d\d\b(?!-)", lambda match: year(match[0])),
    (r"(?<![\w.,/-])((?:1[1-9]|20)\d\d) ?[-–] ?(?=(?:present|now|today)\b)", lambda match: f"{year(match[1])} to "),
    (r"(?<![\w,.])(\d{1,4}|\d,\d{3}) (A\.?D|B\.?C\.?E|B\.?C|C\.?E)\b\.?", _era),
    (rf"\b({_SHORT_WEEKDAY})\.?{_DASH}({_SHORT_WEEKDAY})\b\.?", lambda match: f"{_WEEKDAYS[match[1][:3]]} to {_WEEKDAYS[match[2][:3]]}"),
    # times of day
    (rf"(?<![\w:.,$]){_CLOCK}\s?(?:{_HALF})?{_DASH}{_CLOCK}\s?(?:{_HALF})?(?![\w:]|[.,]\d)", _clock_range),
    (rf"(?<![\w:.])(\d{{1,2}}):([0-5]\d):([0-5]\d)(?:\s?{_HALF})?(?![\w:])", _clock_seconds),
    (r"(?<![\w.,])(\d{1,3})h ?([0-5]?\d)m(?:in)?(?: ?([0-5]?\d)s)?\b", _duration),
    (rf"(?|(?<![\w:.,$]){_CLOCK}\s?{_HALF}|(?<![\w:.]){_HOUR}:([0-5]\d)()(?!:?\w)){_ZONE}", _clock_time),
    # money
    (
        rf"{_MINUS}{_CURRENCY}\s?([-−–])?({_NUM}){_MAGNITUDE}(?:{_DASH}({_MONEY_SIGN})?({_NUM}){_MAGNITUDE}(?![\w@]|[.,]\d|[-–]\d|/\d))?"
        rf"{_PER}(?![\w@]|[.,]\d)",
        _money,
    ),
    (
        rf"{_MINUS}(?<![\w.,])(?:({_NUM}){_DASH})?({_NUM}|\d{{1,12}},\d\d?){_MAGNITUDE}\s?({_MONEY_SIGN}|{_MONEY_CODE}){_PER}(?![\w\d$])",
        _money_after,
    ),
    (rf"\b(\d{{1,5}})([A-Z])? {_STREET_WORDS}", _address),
    # mixed numbers and measures
    (
        r"(?<![\w.,/])(?<!\w-)(?:(\d{1,9})[ -])?(\d{1,9}) ?[/⁄] ?(\d{1,9})(?:(?i:th|rd|nd|st)s?)?"
        rf"(?:\s?{_MEASURE}|(?![\w/]|[.,]\d| ?=))",
        _fraction,
    ),
    (r"(?<![\w.,/])(\d{1,3}\.\d{1,2}) ?/ ?(\d{1,3})(?![\w/]|[.,]\d)", lambda match: f"{number(match[1])} out of {number(match[2])}"),
    (rf"{_START}(?:(\d{{1,9}}) ?)?([{_FRACTION_SIGNS}])(?:\s?{_MEASURE})?", _fraction_sign),
    (rf"{_START}(\d{{1,4}})(['′]|[\"″]) ?[x×] ?(\d{{1,4}})\2(?!\w)", _feet_by_feet),
    (
        rf"{_START}(\d{{1,3}})(?:'|′|’) ?(\d{{1,2}}(?:\.\d)?)(?:\"|″|''|”)(?!\w)",
        lambda match: f"{_counted(match[1], 'foot', 'feet')} {number(match[2])}",
    ),
    (rf"{_START}([3-8])['′](\d|1[01])(?![\w'.,]\d|[\w'])", lambda match: f"{number(match[1])} feet {number(match[2])}"),
    (rf"{_START}(\d{{1,4}}(?:\.\d{{1,4}})?)[\"″](?!\w)", _inches),
    (rf"{_START}(?:(\d{{1,4}})['′]-)?(\d{{1,4}})['′](?![\w'-])", _feet),
    (rf"{_START}(\d{{1,6}}(?:\.\d{{1,6}})?(?:\s?[x×]\s?\d{{1,6}}(?:\.\d{{1,6}})?){{1,3}})(?:\s?{_MEASURE})", _dimensions),
    (r"(?<![\w.,=+*/-])(\d{1,6}(?:\.\d{1,6})?(?:[x×]\d{1,6}(?:\.\d{1,6})?){1,3})()(?![\w]|[.,]\d|\s?[=+])", _dimensions),
    (rf"{_START}({_SIGNED})(?:\s?({_UNIT}))?{_DASH}({_SIGNED})\s?{_MEASURE}", _measure_range),
    (rf"(?<![\w.,])({_SIGNED}){_BIG}\s?{_MEASURE}", _measure),
    (rf"{_START}({_NUM})-({_UNIT}|[a-z]{{3,14}})\b(?!-\d)", _adjective),
    # versions
    (
        r"(?|(?<!\w)([Vv])\.?\s?(\d{1,6}(?:\.\d{1,6}){0,5})|(?<!\w)()(\d{1,6}(?:\.\d{1,6}){2,5}))"
        r"([-.]?(?:alpha|beta|rc|dev|post|a|b)\.?)?(\d{1,4})?\b(?!\.\d)",
        _version,
    ),
    (rf"\b({table.SOFTWARE})[ -](\d{{1,6}}\.\d{{1,6}})()()\b(?!\.\d)", _version),
    # arithmetic
    (rf"(?<![\w.,])(?:{_OPERAND} ?[-−–+*×x·÷/±^] ?){{1,12}}{_OPERAND} ?{_RELATION} ?{_OPERAND}{_MORE_OPERANDS}", _equation),
    (rf"(?<![\w.,])(?:[A-Za-zπ]|{_NUM}) ?{_RELATION} ?{_OPERAND}{_MORE_OPERANDS}", _equation),
    (rf"(?<![\w.,])(?:{_NUM}(?: ?[*×÷·±+] ?| [x/] )){{1,12}}{_NUM}(?![\w^]|[.,]\d)", _equation),
    (r"(?<!\w)(\d{1,9}(?:\.\d{1,9})?)[eE]([-+−]?\d{1,3})\b", _scientific),
    (r"(?<![<-])[-=]>|→", _always("to")),
    (r"(?<!\S)([<>]=?|[≥≤])\s?(?=[$£€]?\d)", lambda match: f"{table.BOUNDS[match[1]]} "),
    (rf"(?<=[\w)] ){_RELATION}(?= [\w-])", _relation),
    (r"\b([A-Za-z]|\d{1,12}(?:\.\d{1,6})?)([⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,4}|\^-?\d{1,4})", _power),
    (rf"([√∛∜]) ?({_NUM}|[A-Za-z]\b)", _root),
    # words before and after numbers
    (rf"(?<=, )({'|'.join(table.STATES)})(?:,? (\d{{5}}(?:-\d{{4}})?))?\b(?=[\s,.;)]|$)", _state),
    (
        rf"\b({table.NAMED_BY_NUMBER})[ -](?|(\d{{3,4}})([A-Z]?)|(\d{{1,2}})([A-Z]))\b(?![.,]?\d|[-–:/]\d)",
        lambda match: f"{match[1]} {house_number(match[2])} {match[3]}".strip(),
    ),
    (r"(?<![\w-])(?!UTC|GMT)([A-Z]{1,3})-?(\d{1,4})\b(?![\w/-]|[.,]\d)", _letters_and_number),
    (rf"(?<![\w.,])(?:({_NUM})[-–])?({_NUM})x(?!\w)(?! ?\d)", _times),
    (
        r"(?<![\w.,])(\d{3,4})([pi])(\d\d)?\b",
        lambda match: f"{house_number(match[1])} {match[2]} {(match[3] and number(match[3])) or ''}".strip(),
    ),
    (r"(?i:\b((?:ending in|pin|otp|pass ?code|password|code)(?: is|:)? ))((?=[a-z]{0,6}\d)[a-z0-9]{3,12})\b(?![-.]\w)", _code),
    (rf"(?|\b(?i:({_any_of(table.NUMBERED)}))\.\s?(?=[#\d])|(?<![\w&])(?i:(pp?|figs?|vol|ch|eq))\s(?=\d)|(?<=, )(No)\s(?=\d))", _numbered),
    (r"(?<=UTC|GMT)[-−](?=\d)", _always(" minus ")),
    (r"(?<![\w&])#\s?(?=\d)", _always("number ")),
    (rf"\b({table.PARTS}|(?i:{table.SMALL_PARTS}))\s{_ROMAN}(?![\w'’])", _part),
    (rf"\b({table.REIGNS})\s{_ROMAN}(?![\w]|\.\w)", _reign),
    (r"\b(?=[IVX])X{0,3}(?:IX|IV|V?I{0,3})(?= [Cc]entur)", lambda match: ordinal(roman(match[0]))),
    (
        r"(?<=\b[A-Z][\w'’]{0,30} )(?<!\b(?:An?|The|By|Via|My|His|Her) )(?=[IVX]{2,6}\b)X{0,3}(?:IX|IV|V?I{0,3})\b(?!['’.]\w)",
        lambda match: cardinal(roman(match[0])),
    ),
    # abbreviations
    (rf"(?<![\w.])({_any_of(table.PHRASES)})(?![\w])", _phrase),
    (rf"(?<![\w.])({'|'.join(table.TITLES)})\.?\s(?=[A-Z]|(?:and|or|&) (?:{'|'.join(table.TITLES)})\b)", _title),
    (rf"(?|(\b[A-Z][\w'’]+ )({'|'.join(table.STREETS)})\b\.|(\b\d{{1,3}}(?:st|nd|rd|th) )({'|'.join(table.STREETS)})\b\.?)", _street),
    (r"\b[NSEW](?=\.? \d{1,3}(?:st|nd|rd|th) [A-Z])\.?", lambda match: table.COMPASS[match[0][0]]),
    (rf"(?<![\w.])({_any_of(table.ABBREVIATIONS)})\.(?!\w)", lambda match: _stopped(table.ABBREVIATIONS[match[1]], match)),
    (
        r"(?<![\w.])(?:[A-Z]\.){2,8}(?![\w])|(?<![\w.])(?:[A-Z]\.){1,8}[A-Z]\b",
        lambda match: _stopped_before_starter(match[0].replace(".", ""), match),
    ),
    (r"\b([A-Z])\.(?=\s[A-Z](?:[a-z]{2,}|\.))", _initial),
    (r"\b((?i:what|who|where|when|why|how|there|here))['’]re\b", lambda match: f"{match[1]} are"),
    (rf"\b({_SHORT_WEEKDAY})(?=, (?:{'|'.join(table.MONTH_NAMES)}|\d))", lambda match: _WEEKDAYS[match[1][:3]]),
    # numbers
    (r"(?<![\w.,-])(\d{1,3}(?:,\d{3}){1,10}|\d{1,36})((?i:st|nd|rd|th))\b", _ordinal),
    (rf"(?<![\w.,/-])({_NUM})(?:[-–—−]| [-–—−] )({_NUM})(?![\w/-]|[.,]\d|\s?=)", _range),
    (r"(?<=\b(?:Apt|Ste|Rm|No)\. |\bexit )(\d{1,3})([A-Z])\b", lambda match: f"{house_number(match[1])} {match[2]}"),
    (rf"(?<![\w.,])(?<!\w-)({_NUM})([kKMB]|bn|mn|mm)\b", _scaled),
    (r"(?<![\w:.,])(\d{1,3}):(\d{1,3})(?![\w:]|[.,]\d)", lambda match: f"{cardinal(match[1])} to {cardinal(match[2])}"),
    (rf"(?<![\w.,])({_NUM})\+(?!\w)", lambda match: f"{number(match[1])} plus"),
    (r"(?<![\w+)])\+(?=\d)", _always("plus ")),
    (r"(?<!\w)~\s?(?=[$£€]?\d)", _always("about ")),
    (rf"(?<![\w.,@/-]){_SIGNED}(?![\w@]|[.,]\d|[-–/@]\w)", _plain_number),
    (
        r"(?<![\w.,/@-])(?=[A-Za-z0-9-]{2,24}(?![\w@/-]|[.,]\w))(?=[A-Za-z-]*\d)(?=[\d-]*[A-Za-z])[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*",
        _letters_and_digits,
    ),
    # capitals
    (rf"\b{_CAPITALS}(?:[ ,:;-]+{_CAPITALS}){{1,60}}\b", _shouted),
    (rf"\b{_CAPITALS}[A-Z]\b", _capitals),
    (rf"(?<=[a-z,] )(?:{table.EMPHASIZED})\b(?=[ ,.!?])", lambda match: match[0].lower()),
)

# What is left after the rules and the grammar: digits and symbols one by one.
LAST_RULES: Rules = (
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,12}", lambda match: _to_the(match[0])),
    (r"[₀₁₂₃₄₅₆₇₈₉]{1,12}", lambda match: spelled(match[0].translate(_SUBSCRIPTS))),
    (r"[0-9]{1,36}", _last_digits),
    (f"[{re.escape(''.join(table.SYMBOLS))}]", _from(table.SYMBOLS)),
)
