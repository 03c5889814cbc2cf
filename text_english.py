"""How written English is read out: rules that turn numbers, symbols and abbreviations into words.

A rule is a pattern and a function from its match to the words, or to None where the match is something else. Rules are tried in the order
of `RULES`; text that one rule has read is not offered to the next. All patterns are bounded, so the time is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

import regex

Match = re.Match[str]  # those of `regex` have the same methods
Reader = Callable[[Match], "str | None"]

# --- Numbers ---

# fmt: off
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
# fmt: on
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: off
_SCALES = [
    "thousand", "million", "billion", "trillion", "quadrillion", "quintillion", "sextillion", "septillion", "octillion", "nonillion",
    "decillion",
]
# fmt: on
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_LONGEST_NUMBER = 36  # digits: there are words up to decillions


def cardinal(digits: str) -> str:
    """Return a whole number in words: "1234" is "one thousand two hundred and thirty four". Leading zeros are read out."""
    zeros = len(digits) - len(digits.lstrip("0"))
    if len(digits) > _LONGEST_NUMBER or (zeros and len(digits) > 1):
        return spelled(digits)
    groups = [int(digits[max(0, end - 3) : end]) for end in range(len(digits), 0, -3)]
    parts = [
        f"{_hundreds(group)} {_SCALES[power - 1]}" if power else _hundreds(group, joined=True, alone=len(groups) != 2)
        for power, group in reversed(list(enumerate(groups)))
        if group
    ]
    return " ".join(parts) or "zero"


def _hundreds(number: int, *, joined: bool = False, alone: bool = True) -> str:
    """Return 1 to 999 in words, with "and" before the tens if `joined`; with `alone` unset also where there are no hundreds."""
    hundreds, rest = divmod(number, 100)
    words = [f"{_ONES[hundreds]} hundred"] if hundreds else []
    if rest:
        words += ["and"] if joined and (hundreds or not alone) else []
        words.append(_below_hundred(rest))
    return " ".join(words)


def _below_hundred(number: int) -> str:
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f" {_ONES[number % 10]}" if number % 10 else "")


def spelled(digits: str) -> str:
    """Return each digit in words: "007" is "zero zero seven"."""
    return " ".join(_ONES[int(digit)] for digit in digits)


def ordinal(digits: str) -> str:
    """Return "21" as "twenty first"."""
    head, _, last = cardinal(digits).replace(" and ", " ").rpartition(" ")
    last = _ORDINALS[last] if last in _ORDINALS else f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th"
    return f"{head} {last}".strip()


def year(digits: str) -> str:
    """Return a year of four digits as it is said: "1906" is "nineteen oh six", "2006" is "two thousand six"."""
    first, last = int(digits[:2]), int(digits[2:])
    if digits[1:3] == "00":
        return cardinal(digits[0] + "000") + (f" {_ONES[last]}" if last else "")
    if not last:
        return f"{_below_hundred(first)} hundred"
    return f"{_below_hundred(first)} {'oh ' if last < 10 else ''}{_below_hundred(last)}"


def number(text: str) -> str:
    """Return a number in words: "1,234.50", ".5", "-3", "1,5" (a decimal comma), "007"."""
    negative = text[0] in "-−–"
    plain = text.lstrip("-−–+")
    if re.fullmatch(r"\d+,(?:\d{1,2}|\d{4,})", plain):
        plain = plain.replace(",", ".")
    whole, point, decimals = plain.replace(",", "").partition(".")
    # Ten digits or more without commas are a code: an account, a card, an article.
    is_code = "," not in plain and len(whole) >= _CODE_LENGTH
    words = [spelled(whole) if is_code else cardinal(whole)] if whole else []
    if point and decimals:
        words += ["point", spelled(decimals)]
    return ("minus " if negative else "") + " ".join(words)


def _counted(text: str) -> str:
    """Return a number as a count or a year: four digits from 1100 to 2099 are read in pairs."""
    return year(text) if _YEAR.fullmatch(text) else number(text)


_CODE_LENGTH = 10
_YEAR = re.compile(r"1[1-9]\d\d|20\d\d")
_NUM = r"(?>\d{1,3}(?:,\d{3}){1,11}(?!\d)(?:\.\d{1,20})?|\d{1,12},\d{1,2}(?![\d,])|\d{1,36}(?:\.\d{1,20})?|\.\d{1,20})"
_START = r"(?<![\w.,])"
_SIGNED = rf"(?:(?<![\w)\]}}.,])[-−–](?=[\d.]))?{_NUM}"
_END = r"(?![\w]|[.,]\d)"
_DASH = r"\s?[-–—−]\s?"


def _one(text: str) -> bool:
    return text.replace(",", "").lstrip("-−–") in ("1", "1.0", "1.00")


# --- Literals ---

# fmt: off
# fmt: off
_LITERALS = {
    "24/7": "twenty four seven", "9/11": "nine eleven", "50/50": "fifty fifty", "50-50": "fifty fifty", "20/20": "twenty twenty",
    "401(k)": "four oh one k", "C#": "C sharp", "F#": "F sharp", "C++": "C plus plus", "c++": "C plus plus", ".NET": "dot net",
    "CO2": "CO two", "CO₂": "CO two", "H2O": "H two O", "H₂O": "H two O", "O₂": "O two", "B2B": "B to B", "B2C": "B to C", "P2P": "P to P",
    "COVID-19": "covid nineteen", "Covid-19": "covid nineteen", "covid-19": "covid nineteen", "w/o": "without", "w/": "with",
    "b/c": "because", "c/o": "care of", "and/or": "and or", "n/a": "not applicable", "N/A": "not applicable", "R&D": "R and D",
    "Q&A": "Q and A", "R&B": "R and B", "AT&T": "AT and T", "I/O": "IO", "TCP/IP": "TCPIP", "km/h": "kilometers per hour",
    "MP3": "MP three", "MP4": "MP four", "mp3": "MP three", "mp4": "MP four", "№": "number", "℃": "degrees Celsius",
    "℉": "degrees Fahrenheit",
}
# fmt: on
# fmt: on

# --- Calendar ---

_MONTHS = dict(
    zip(
        ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
        ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"],
        strict=True,
    )
)
_MONTH_NAMES = list(_MONTHS.values())
# fmt: off
_WEEKDAYS = {
    "mon": "Monday", "tue": "Tuesday", "tues": "Tuesday", "wed": "Wednesday", "weds": "Wednesday", "thu": "Thursday", "thur": "Thursday",
    "thurs": "Thursday", "fri": "Friday", "sat": "Saturday", "sun": "Sunday",
}
# fmt: on
_MONTH = r"(?i:(January|February|March|April|May|June|July|August|September|October|November|December|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)"
_WEEKDAY = r"(?:(Mon|Tues?|Weds?|Thu(?:rs?)?|Fri|Sat|Sun)\b\.?,? )?"
_DAY = r"(0?[1-9]|[12]\d|3[01])"


def _month(text: str) -> str:
    return _MONTHS[text[:3].lower()]


def _weekday(text: str | None) -> str:
    return f"{_WEEKDAYS[text.lower()]}, " if text else ""


def _short_year(text: str) -> str:
    if len(text) == 4:
        return year(text)
    return f"oh {_ONES[int(text)]}" if int(text) < 10 else _below_hundred(int(text))


def _numeric_date(month: str, day: str, of_year: str) -> str | None:
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return None
    return f"{_MONTH_NAMES[int(month) - 1]} {ordinal(day.lstrip('0'))}, {_short_year(of_year)}"


def _us_date(match: Match) -> str | None:
    first, second, of_year = match[1], match[3], match[4]
    if int(first) > 12:
        words = _numeric_date(second, first, of_year)
        return words and f"the {ordinal(first.lstrip('0'))} of {_MONTH_NAMES[int(second) - 1]}, {_short_year(of_year)}"
    return _numeric_date(first, second, of_year)


def _after_comma(comma: str | None) -> str:
    return ", " if comma and "," in comma else " "


def _month_day(match: Match) -> str | None:
    weekday, month, day, last, comma, of_year = match.groups()
    if month in ("may", "march", "mar") and not of_year:
        return None  # "I may 5 times", "they march 10 miles"
    words = f"{_weekday(weekday)}{_month(month)} {ordinal(day.lstrip('0'))}"
    words += f" to {ordinal(last.lstrip('0'))}" if last else ""
    return words + (f"{_after_comma(comma)}{year(of_year)}" if of_year else "")


def _day_month(match: Match) -> str | None:
    weekday, the, day, last, month, comma, of_year = match.groups()
    if month in ("may", "march", "mar") and not of_year and (last or day)[-1] + " " + month in match[0]:
        return None  # "children aged 5-9 may come"
    # The article of "the 5th of May" stays in the text before the match.
    days = ordinal(day.lstrip("0")) + (f" to the {ordinal(last.lstrip('0'))}" if last else "")
    words = f"{_weekday(weekday)}{'' if the else 'the '}{days} of {_month(month)}"
    return (the or "") + words + (f"{_after_comma(comma)}{year(of_year)}" if of_year else "")


def _month_year(match: Match) -> str:
    return f"{_month(match[1])}{_after_comma(match[2])}{year(match[3])}"


def _decade(match: Match) -> str:
    century, tens = match[1], int(match[2])
    if century and not tens:
        return cardinal(f"{int(century) // 10}000") + "s" if century.endswith("0") else f"{_below_hundred(int(century))} hundreds"
    plural = _TENS[tens] + "s" if tens == 1 else _TENS[tens][:-1] + "ies"
    return f"{_below_hundred(int(century))} {plural}" if century else plural


def _decade_range(match: Match) -> str | None:
    first, last = _RULE_DECADE.match(match[1]), _RULE_DECADE.match(match[2])
    return f"{_decade(first)} to {_decade(last)}" if first and last else None


def _weekday_range(match: Match) -> str:
    return f"{_WEEKDAYS[match[1].lower()]} to {_WEEKDAYS[match[2].lower()]}"


_ERA = {"ad": "AD", "bc": "BC", "bce": "BCE", "ce": "CE"}


def _era(match: Match) -> str:
    digits = match[1].replace(",", "")
    words = f"{_ONES[int(digits[0])]} {_below_hundred(int(digits[1:]))}" if len(digits) == 3 and digits[1] != "0" else _counted(digits)
    return f"{words} {_stopped(_ERA[match[2].replace('.', '').lower()], match)}"


_QUARTERS = ("first", "second", "third", "fourth")


def _quarter(match: Match) -> str:
    of_year = match[3] or match[4]
    return f"the {_QUARTERS[int(match[1] or match[2]) - 1]} quarter of {year(of_year if len(of_year) == 4 else '20' + of_year)}"


# --- Clock ---

_HALF = r"([AaPp])\.?[Mm]\b\.?"
_CLOCK = r"([01]?\d|2[0-4])(?:[:.]([0-5]\d))?"


def _clock(hour: str, minute: str | None, half: str | None) -> str:
    words = cardinal(str(int(hour)))
    if minute and minute != "00":
        words += f" oh {_ONES[int(minute)]}" if int(minute) < 10 else f" {_below_hundred(int(minute))}"
    elif minute and not half:
        words += " hundred hours" if hour in ("00", "24") else " o'clock"
    return words + (f" {half.upper()}M" if half else "")


def _sentence_end(match: Match) -> bool:
    """Whether a full stop that the match ends with also ends the sentence."""
    rest = match.string[match.end() :]
    return match[0].endswith(".") and re.match(r"[\"'”’)\]]*(?:\s*$|\s+[\"“‘(]?[A-Z])", rest) is not None


def _clock_time(match: Match) -> str:
    words = _clock(match[1], match[2], match[3])
    return _with_zone(words, match[4]) if match[4] else _stopped(words, match)


def _with_zone(words: str, zone: str | None) -> str:
    return f"{words} {zone.replace('.', '').upper()}" if zone else words


def _clock_plain(match: Match) -> str:
    return _with_zone(_clock(match[1], match[2], None), match[3])


def _clock_range(match: Match) -> str | None:
    hour, minute, half, last_hour, last_minute, last_half = match.groups()
    if not (half or last_half or (minute and last_minute)):
        return None
    return _stopped(f"{_clock(hour, minute, half)} to {_clock(last_hour, last_minute, last_half)}", match)


def _clock_seconds(match: Match) -> str:
    named = zip((match[1], match[2], match[3]), ("hour", "minute", "second"), strict=True)
    parts = [_quantity(str(int(value)), (name, f"{name}s")) for value, name in named]
    half = f" {match[4].upper()}M" if match[4] else ""
    return _stopped(f"{parts[0]} {parts[1]} and {parts[2]}{half}", match)


# --- Money ---

# fmt: off
# fmt: off
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"), "£": ("pound", "pounds", "penny", "pence"), "€": ("euro", "euros", "cent", "cents"),
    "¥": ("yen", "yen", "sen", "sen"), "₹": ("rupee", "rupees", "paisa", "paise"), "₩": ("won", "won", "jeon", "jeon"),
    "₽": ("ruble", "rubles", "kopek", "kopeks"), "₺": ("lira", "lira", "kurus", "kurus"),
    "₿": ("bitcoin", "bitcoins", "satoshi", "satoshis"), "₴": ("hryvnia", "hryvnias", "kopiyka", "kopiykas"),
    "₪": ("shekel", "shekels", "agora", "agorot"), "฿": ("baht", "baht", "satang", "satang"),
    "CHF": ("Swiss franc", "Swiss francs", "centime", "centimes"), "CNY": ("yuan", "yuan", "fen", "fen"),
    "RMB": ("yuan", "yuan", "fen", "fen"), "MXN": ("Mexican peso", "Mexican pesos", "centavo", "centavos"),
    "BRL": ("real", "reais", "centavo", "centavos"), "SEK": ("Swedish krona", "Swedish kronor", "ore", "ore"),
    "NOK": ("Norwegian krone", "Norwegian kroner", "ore", "ore"), "DKK": ("Danish krone", "Danish kroner", "ore", "ore"),
    "PLN": ("zloty", "zlotys", "grosz", "groszy"), "Rs": ("rupee", "rupees", "paisa", "paise"),
}
# fmt: on
# fmt: on
# fmt: off
_CODES = {
    "USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹", "KRW": "₩", "RUB": "₽", "BTC": "₿", "TRY": "₺", "UAH": "₴", "ILS": "₪",
    "THB": "฿",
}
# fmt: on
# fmt: off
_DOLLARS = {
    "US": "US ", "C": "Canadian ", "CA": "Canadian ", "CAD": "Canadian ", "A": "Australian ", "AU": "Australian ", "AUD": "Australian ",
    "NZ": "New Zealand ", "HK": "Hong Kong ", "S": "Singapore ",
}
# fmt: on
# fmt: off
_MAGNITUDES = {
    "k": "thousand", "thousand": "thousand", "m": "million", "mn": "million", "mm": "million", "mio": "million", "million": "million",
    "b": "billion", "bn": "billion", "billion": "billion", "t": "trillion", "tn": "trillion", "trillion": "trillion", "hundred": "hundred",
}
# fmt: on
_MAGNITUDE = r"(?:\s?((?i:hundred|thousand|million|billion|trillion|mio|bn|tn|mn|mm|[kmbt]))\b)?"
# fmt: off
_PERIODS = {
    "yr": "year", "y": "year", "year": "year", "mo": "month", "mth": "month", "month": "month", "wk": "week", "week": "week", "d": "day",
    "day": "day", "hr": "hour", "h": "hour", "hour": "hour", "min": "minute", "kg": "kilogram", "g": "gram", "lb": "pound", "oz": "ounce",
    "gal": "gallon", "mi": "mile", "km": "kilometer", "kWh": "kilowatt hour", "GB": "gigabyte", "person": "person", "user": "user",
    "unit": "unit", "night": "night", "share": "share", "sq": "square", "ea": "each",
}
# fmt: on
_PER = rf"(?:/({'|'.join(sorted(_PERIODS, key=len, reverse=True))})\b)?"
_SIGN_CODES = "|".join([*map(re.escape, _CODES), *(re.escape(code) for code in _CURRENCIES if len(code) > 1)])
_CURRENCY = rf"(?:(US|CAD?|C|AUD?|A|NZ|HK|S)(?=\$))?([$£€¥₹₩₽₺₿₴₪฿]|\b(?:{_SIGN_CODES})\b\.?)"
_MINUS = r"(?:(?<![\w)\]}])([-−–]))?"


def _amount(name: str, amount: str, magnitude: str | None, prefix: str | None = None) -> str:
    """Return an amount of money in words: two decimals are cents, more are read out."""
    code = name.rstrip(".")
    one, many, cent, cents = _CURRENCIES[_CODES.get(code, code)]
    country = _DOLLARS[prefix] if prefix else ""
    if magnitude:
        return f"{_round(amount)} {_MAGNITUDES[magnitude.lower()]} {country}{many}"
    whole, _, decimals = amount.replace(",", "").partition(".")
    decimals = decimals.rstrip("0").ljust(2, "0") if decimals else "00"
    if len(decimals) > 2:
        return f"{number((whole and cardinal_text(whole)) + '.' + decimals)} {country}{many}"
    parts = []
    if int(whole or 0) or not int(decimals):
        parts.append(f"{cardinal(whole or '0')} {country}{one if _one(whole) else many}")
    if int(decimals):
        parts.append(f"{cardinal(str(int(decimals)))} {cent if int(decimals) == 1 else cents}")
    return " ".join(parts)


def _round(amount: str) -> str:
    """Return a number before "million" and the like, which is said without "and"."""
    return number(amount).replace(" and ", " ")


def cardinal_text(whole: str) -> str:
    """Return `whole` without leading zeros."""
    return whole.lstrip("0") or "0"


def _money(match: Match) -> str:
    minus, prefix, name, inner, amount, magnitude, last_name, last, last_magnitude, period = match.groups()
    words = "minus " if minus or inner else ""
    if last:
        first = _amount(name, amount, magnitude, prefix) if last_name or magnitude or "." in amount else number(amount)
        words += f"{first} to {_amount(name, last, last_magnitude, prefix)}"
    else:
        words += _amount(name, amount, magnitude, prefix)
        words = _attributive(words, match)
    return words + _per(period)


def _attributive(words: str, match: Match) -> str:
    """Return an amount or measure in the singular where it describes a noun: "a $500 fine", "a 90° turn"."""
    before, after = match.string[max(0, match.start() - 3) : match.start()], match.string[match.end() : match.end() + 12]
    if not (_ARTICLE.search(before) and _NOUN.match(after)):
        return words
    for many, one in _ATTRIBUTES:
        words = words.replace(many, one)
    return words


_ARTICLE = re.compile(r"\b[Aa]n? $")
_NOUN = re.compile(r" (?!(?:of|per|and|or|in|for|on|at|to|from|by|is|was|a|an|the|each|every|more|less)\b)[a-z]{3}")
# fmt: off
_ATTRIBUTES = [
    ("dollars", "dollar"), ("euros", "euro"), ("pounds", "pound"), ("degrees", "degree"), ("meters", "meter"), ("grams", "gram"),
    ("liters", "liter"), ("miles", "mile"), ("feet", "foot"), ("inches", "inch"), ("bytes", "byte"), ("minutes", "minute"),
    ("hours", "hour"), ("seconds", "second"), ("watts", "watt"), ("volts", "volt"),
]
# fmt: on


def _per(period: str | None) -> str:
    return f" per {_PERIODS[period]}" if period else ""


def _money_after(match: Match) -> str:
    minus, first, amount, magnitude, name, period = match.groups()
    amount = _decimal_point(amount)
    words = "minus " if minus else ""
    words += f"{number(first)} to " if first else ""
    return words + _amount(name, amount, magnitude) + _per(period)


def _decimal_point(amount: str) -> str:
    return amount.replace(",", ".") if re.fullmatch(r"\d+,\d{1,2}", amount) else amount


def _cents(match: Match) -> str:
    return f"{number(match[1])} {'cent' if _one(match[1]) else 'cents'}"


# --- Measures ---

# fmt: off
# fmt: off
_UNITS = {
    "km": "kilometer", "m": "meter", "cm": "centimeter", "mm": "millimeter", "µm": "micrometer", "μm": "micrometer", "nm": "nanometer",
    "kg": "kilogram", "KG": "kilogram", "Kg": "kilogram", "g": "gram", "mg": "milligram", "µg": "microgram", "μg": "microgram",
    "mcg": "microgram", "lb": "pound", "lbs": "pound", "oz": "ounce", "ft": "foot", "in": "inch", "yd": "yard", "yds": "yard",
    "mi": "mile", "l": "liter", "L": "liter", "ml": "milliliter", "mL": "milliliter", "cl": "centiliter", "gal": "gallon", "qt": "quart",
    "pt": "pint", "tsp": "teaspoon", "tbsp": "tablespoon", "Tbsp": "tablespoon", "ha": "hectare", "Hz": "hertz", "kHz": "kilohertz",
    "MHz": "megahertz", "GHz": "gigahertz", "KB": "kilobyte", "kB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte",
    "PB": "petabyte", "KiB": "kibibyte", "MiB": "mebibyte", "GiB": "gibibyte", "TiB": "tebibyte", "kbps": "kilobit per second",
    "Mbps": "megabit per second", "mbps": "megabit per second", "Gbps": "gigabit per second", "gbps": "gigabit per second", "hr": "hour",
    "hrs": "hour", "h": "hour", "min": "minute", "mins": "minute", "s": "second", "sec": "second", "secs": "second", "ms": "millisecond",
    "µs": "microsecond", "μs": "microsecond", "ns": "nanosecond", "mph": "mile per hour", "kph": "kilometer per hour",
    "kmh": "kilometer per hour", "rpm": "revolution per minute", "bpm": "beat per minute", "fps": "frame per second",
    "dpi": "dot per inch", "W": "watt", "kW": "kilowatt", "MW": "megawatt", "GW": "gigawatt", "kWh": "kilowatt hour",
    "MWh": "megawatt hour", "mAh": "milliamp hour", "V": "volt", "mV": "millivolt", "kV": "kilovolt", "mA": "milliamp", "J": "joule",
    "kJ": "kilojoule", "kcal": "kilocalorie", "cal": "calorie", "N": "newton", "Pa": "pascal", "hPa": "hectopascal", "kPa": "kilopascal",
    "bar": "bar", "psi": "PSI", "dB": "decibel", "px": "pixel", "cc": "CC", "K": "kelvin", "Ω": "ohm", "kΩ": "kiloohm",
    "sq ft": "square foot", "sq mi": "square mile", "sq m": "square meter", "cu ft": "cubic foot", "fl oz": "fluid ounce",
    "pct": "percent", "%": "percent", "‰": "per mille", "pp": "percentage point", "°C": "degree Celsius", "° C": "degree Celsius",
    "ºC": "degree Celsius", "℃": "degree Celsius", "°F": "degree Fahrenheit", "° F": "degree Fahrenheit", "ºF": "degree Fahrenheit",
    "℉": "degree Fahrenheit", "°": "degree", "º": "degree", "deg": "degree",
}
# fmt: on
# fmt: on
# Letters that name something else right after a number: "4s", "5K".
_SPACED = frozenset({"s", "K", "N", "J"})
# fmt: off
_IRREGULAR = {
    "foot": "feet", "inch": "inches", "hertz": "hertz", "kilohertz": "kilohertz", "megahertz": "megahertz", "gigahertz": "gigahertz",
    "percent": "percent", "per mille": "per mille", "P S I": "PSI", "C C": "CC", "kelvin": "kelvin",
}
# fmt: on
_UNIT = "(?:" + "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True)) + ")"
_POWERS = {"²": "square ", "2": "square ", "³": "cubic ", "3": "cubic ", "^2": "square ", "^3": "cubic ", "": ""}
_MEASURE = rf"({_UNIT})(²|³|\^?[23])?(?:/({_UNIT}|yr|year|day|week|month|person|d|wk|mo)(²|³)?)?(?![\w²³])\.?"
_BIG = r"(?:\s((?i:hundred|thousand|million|billion|trillion)))?"


def _plural(name: str) -> str:
    """Return the plural of a unit: the first word of "mile per hour", the last of "square foot", "degree" of "degree Celsius"."""
    head, sep, tail = name.partition(" per ") if " per " in name else name.partition(" C") if name.startswith("degree") else (name, "", "")
    if head.startswith("degree"):
        return head.replace("degree", "degrees") + sep + tail
    first, space, last = head.rpartition(" ")
    plural = head if head in _IRREGULAR.values() else None
    plural = plural or _IRREGULAR.get(head) or f"{first}{space}{_IRREGULAR.get(last, last + 's')}"
    return plural + sep + tail


def _quantity(amount: str, names: tuple[str, str]) -> str:
    return f"{number(amount)} {names[0] if _one(amount) else names[1]}"


def _unit_names(match: Match, at: int) -> tuple[str, str]:
    """Return the singular and plural of the unit whose groups begin at `at`."""
    unit, power, per, per_power = match[at], match[at + 1] or "", match[at + 2], match[at + 3] or ""
    one = _POWERS[power] + _UNITS[unit]
    suffix = ""
    if per:
        suffix = f" per {_POWERS[per_power]}{_UNITS.get(per) or _PERIODS[per]}"
    return one + suffix, _plural(one) + suffix


def _is_unit(match: Match, at: int, before: str) -> bool:
    """Whether letters that could be a word or a name are a unit here."""
    unit = match[at]
    if unit == "in":
        rest = match.string[match.end() :]
        return (
            match[0].endswith(".") or not rest.strip() or re.match(r"\s*[,;)x×]|\s+(?:tall|wide|long|high|thick|deep)\b", rest) is not None
        )
    return not (before.isdigit() and unit in _SPACED and not match[at + 2])


def _stopped(words: str, match: Match) -> str:
    """Return `words`, with a full stop if the match ends with one that ends the sentence too."""
    return words + "." if _sentence_end(match) else words


def _unit_measure(match: Match) -> str | None:
    amount, big = match[1], match[2]
    if not _is_unit(match, 3, match.string[match.start(3) - 1]):
        return None
    one, many = _unit_names(match, 3)
    words = f"{_round(amount)} {big} {many}" if big else _quantity(amount, (one, many))
    return _stopped(_attributive(words, match), match)


def _adjective(match: Match) -> str:
    """Return "a 4-kilogram bag" with the unit as it is written."""
    return f"{number(match[1])} {_UNITS.get(match[2], match[2])}"


def _measure_range(match: Match) -> str | None:
    if not _is_unit(match, 4, match.string[match.start(4) - 1]):
        return None
    _, many = _unit_names(match, 4)
    first = number(match[1])
    if match[2]:
        first += f" {_UNITS.get(match[2]) and _plural(_UNITS[match[2]])}"
    return _stopped(f"{first} to {number(match[3])} {many}", match)


def _dimensions(match: Match) -> str:
    parts = re.split(r"\s?[x×]\s?", match[1])
    words = " by ".join(house_number(part) if part.isdigit() else number(part) for part in parts)
    if match[2]:
        words += f" {_unit_names(match, 2)[1]}"
    return _stopped(words, match)


def _feet_inches(match: Match) -> str:
    feet, inches = match[1], match[2]
    words = f"{number(feet)} {'foot' if _one(feet) else 'feet'}"
    return f"{words} {number(inches)}" if inches else words


def _inches(match: Match) -> str | None:
    if match.string.count('"', 0, match.start()) % 2 and not match[0].endswith("″"):
        return None  # it closes a quotation
    return _quantity(match[1], ("inch", "inches"))


def _feet(match: Match) -> str | None:
    if match[0].endswith("'") and match.string.count("'", 0, match.start()):
        return None
    first = f"{number(match[1])} to " if match[1] else ""
    return first + _quantity(match[2], ("foot", "feet"))


# --- Fractions, powers and arithmetic ---

_FRACTION_SIGNS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


def fraction(top: str, bottom: str) -> str:
    """Return "3", "4" as "three quarters"."""
    if bottom == "2":
        name, names = "half", "halves"
    elif bottom == "4":
        name, names = "quarter", "quarters"
    elif bottom == "1":
        return f"{cardinal(top).replace(' and ', ' ')} over one"
    else:
        name = ordinal(bottom).replace(" and ", " ")
        names = f"{name}s"
    return f"{cardinal(top).replace(' and ', ' ')} {name if top == '1' else names}"


def _fraction(match: Match) -> str | None:
    whole, top, bottom = match[1], match[2], match[3]
    if bottom.strip("0") == "" or top[0] == "0":
        return None
    if top == bottom and not whole and not match[4]:
        return f"{cardinal(top)} out of {cardinal(bottom)}"
    words = fraction(top, bottom)
    return _mixed(match, whole, words, 4)


def _fraction_sign(match: Match) -> str | None:
    top, _, bottom = unicodedata.normalize("NFKC", match[2]).partition("\u2044")
    return _mixed(match, match[1], fraction(top, bottom), 3)


def _mixed(match: Match, whole: str | None, words: str, unit_at: int) -> str | None:
    """Return a whole number and a fraction with the unit after them, whose groups begin at `unit_at`."""
    if whole:
        words = f"{number(whole)} and {'a half' if words == 'one half' else words}"
    if not match[unit_at]:
        return words
    one, many = _unit_names(match, unit_at)
    return _stopped(f"{words} {many if whole else one}", match)


def _power(match: Match) -> str:
    base = number(match[1]) if match[1][0].isdigit() else match[1]
    return f"{base} {_to_the(match[2].translate(_SUPERSCRIPTS).lstrip('^'))}"


def _to_the(exponent: str) -> str:
    if exponent in ("2", "3"):
        return "squared" if exponent == "2" else "cubed"
    if exponent.startswith(("-", "−")):
        return f"to the minus {cardinal(exponent[1:])}"
    return f"to the {ordinal(exponent)}" if len(exponent) < 3 else f"to the power of {cardinal(exponent)}"


_BOUNDS = {">": "more than", "<": "less than", ">=": "at least", "<=": "at most", "≥": "at least", "≤": "at most"}


def _scientific(match: Match) -> str:
    exponent = match[2].lstrip("+")
    power = f"minus {cardinal(exponent[1:])}" if exponent[0] in "-−" else ordinal(exponent)
    return f"{number(match[1])} times ten to the {power}"


def _root(match: Match) -> str:
    name = {"√": "square", "∛": "cube", "∜": "fourth"}[match[1]]
    return f"the {name} root of {number(match[2]) if match[2][0].isdigit() else match[2]}"


# fmt: off
_OPERATORS = {
    "-": "minus", "−": "minus", "–": "minus", "+": "plus", "*": "times", "×": "times", "x": "times", "·": "times", "÷": "divided by",
    "/": "divided by", "=": "equals", "≠": "is not equal to", "≈": "is about", "≥": "is at least", "≤": "is at most",
    ">": "is greater than", "<": "is less than", ">=": "is at least", "<=": "is at most", "!=": "is not equal to", "==": "equals",
    "±": "plus or minus", "^": "to the power of",
}
# fmt: on
_OPERAND = rf"(?:(?:[-−]?{_NUM}|[A-Za-zπ])(?:[²³]|\^[23])?|[a-z]{{2}}(?:[²³]|\^[23]))"
_EQUATION_PART = re.compile(rf"({_NUM}|[A-Za-zπ]+)([²³]|\^[23])?|(>=|<=|!=|==|[-−–+*×x·÷/=≠≈≥≤<>±^])|\s+")


def _equation(match: Match) -> str:
    words, expect_operand = [], True
    for part in _EQUATION_PART.finditer(match[0]):
        if part[3] or (part[1] == "x" and not expect_operand):
            words.append("minus" if expect_operand else _OPERATORS[part[0]])
            expect_operand = True
        elif part[1]:
            words.append(number(part[1]) if part[1][0] in "0123456789." else _SYMBOLS.get(part[1], part[1]))
            words += [_to_the(part[2].lstrip("^").translate(_SUPERSCRIPTS))] if part[2] else []
            expect_operand = False
    return " ".join(words)


# --- Telephone numbers, addresses, versions ---


def _groups(text: str) -> str:
    return ", ".join(spelled(group) for group in re.findall(r"\d+", text))


def _phone(match: Match) -> str:
    country, rest, extension = match[1], match[2], match[3]
    if country and country.strip("+-. (") == "1" and "800" in rest[:5]:
        rest = re.sub(r"\D*800\D*", "", rest, count=1)
        words = f"one, eight hundred, {_groups(rest)}"
    else:
        words = (f"{'plus ' if '+' in country else ''}{_groups(country)}, " if country else "") + _groups(rest)
    return words + (f", extension {spelled(extension)}" if extension else "")


def _international(match: Match) -> str:
    return f"plus {_groups(match[1])}"


def _digits_only(match: Match) -> str:
    return _groups(match[0])


def _ip_address(match: Match) -> str:
    words = " dot ".join(spelled(group) for group in match[1].split("."))
    words += f" slash {cardinal(match[3])}" if match[3] else ""
    return words + (f" port {spelled(match[2])}" if match[2] else "")


def _version(match: Match) -> str:
    words = " point ".join(cardinal(part) for part in match[2].split("."))
    words = f"version {words}" if match[1] else words
    suffix = match[3] or ""
    return words + (f" {suffix.strip('-.')} {cardinal(match[4])}" if suffix and match[4] else f" {suffix.strip('-.')}" if suffix else "")


def _software_version(match: Match) -> str:
    return f"{match[1]} {' point '.join(cardinal(part) for part in match[2].split('.'))}"


# fmt: off
_STREETS = {
    "St": "Street", "Ave": "Avenue", "Blvd": "Boulevard", "Rd": "Road", "Dr": "Drive", "Ln": "Lane", "Ct": "Court", "Pl": "Place",
    "Sq": "Square", "Hwy": "Highway", "Pkwy": "Parkway", "Expy": "Expressway", "Ter": "Terrace", "Cir": "Circle",
}
# fmt: on
# fmt: off
_COMPASS = {
    "N": "North", "S": "South", "E": "East", "W": "West", "NE": "Northeast", "NW": "Northwest", "SE": "Southeast", "SW": "Southwest",
}
# fmt: on
_STATES = dict(
    part.split("=")
    for part in [
        "AL=Alabama",
        "AK=Alaska",
        "AZ=Arizona",
        "AR=Arkansas",
        "CA=California",
        "CO=Colorado",
        "CT=Connecticut",
        "DE=Delaware",
        "FL=Florida",
        "GA=Georgia",
        "HI=Hawaii",
        "ID=Idaho",
        "IL=Illinois",
        "IN=Indiana",
        "IA=Iowa",
        "KS=Kansas",
        "KY=Kentucky",
        "LA=Louisiana",
        "ME=Maine",
        "MD=Maryland",
        "MA=Massachusetts",
        "MI=Michigan",
        "MN=Minnesota",
        "MS=Mississippi",
        "MO=Missouri",
        "MT=Montana",
        "NE=Nebraska",
        "NV=Nevada",
        "NH=New_Hampshire",
        "NJ=New_Jersey",
        "NM=New_Mexico",
        "NY=New_York",
        "NC=North_Carolina",
        "ND=North_Dakota",
        "OH=Ohio",
        "OK=Oklahoma",
        "OR=Oregon",
        "PA=Pennsylvania",
        "RI=Rhode_Island",
        "SC=South_Carolina",
        "SD=South_Dakota",
        "TN=Tennessee",
        "TX=Texas",
        "UT=Utah",
        "VT=Vermont",
        "VA=Virginia",
        "WA=Washington",
        "WV=West_Virginia",
        "WI=Wisconsin",
        "WY=Wyoming",
    ]
)
_STREET_WORDS = (
    rf"((?:(?:[NSEW]{{1,2}}\.? )?(?:[A-Z][A-Za-z'’]{{1,20}}|\d{{1,3}}(?:st|nd|rd|th)) ){{1,3}}?)({'|'.join(_STREETS)}|st|hwy)\b\.?"
)


_NAMED_BY_NUMBER = [
    "Room",
    "Flight",
    "Highway",
    "Route",
    "Interstate",
    "Suite",
    "Apartment",
    "Apt",
    "Boeing",
    "Airbus",
    "Gate",
    "Exit",
    "Channel",
    "Bus",
    "Building",
    "Studio",
    "Unit",
    "Area",
    "Hwy",
    "Hwy.",
    "Peugeot",
    "Porsche",
    "BMW",
    "room",
    "suite",
    "apartment",
    "flight",
]


def house_number(digits: str) -> str:
    """Return a house number as it is said: "1428" is "fourteen twenty eight", "708" "seven oh eight"."""
    if len(digits) == 4 and digits[1:] != "000":
        return year(digits) if digits[2:] != "00" else f"{_below_hundred(int(digits[:2]))} hundred"
    if len(digits) == 3 and digits[1:] != "00":
        return f"{_ONES[int(digits[0])]} {'oh ' + _ONES[int(digits[2])] if digits[1] == '0' else _below_hundred(int(digits[1:]))}"
    return spelled(digits) if len(digits) == 5 or digits[0] == "0" else cardinal(digits)


def _address(match: Match) -> str:
    parts = []
    for word in match[3].split():
        numbered = re.fullmatch(r"(\d+)(?:st|nd|rd|th)", word)
        parts.append(ordinal(numbered[1]) if numbered else _COMPASS.get(word.rstrip("."), word))
    street = _STREETS[match[4].capitalize()]
    number_and_letter = f"{house_number(match[1])} {match[2] or ''}".strip()
    return _stopped(f"{number_and_letter} {' '.join(parts)} {street}", match)


def _state(match: Match) -> str:
    words = _STATES[match[1]].replace("_", " ")
    return f"{words} {_groups(match[2])}" if match[2] else words


# --- Abbreviations ---

# fmt: off
_TITLES = {
    "Mr": "Mister", "Mrs": "Misses", "Ms": "Miz", "Dr": "Doctor", "Prof": "Professor", "St": "Saint", "Mt": "Mount", "Ft": "Fort",
    "Gen": "General", "Gov": "Governor", "Sen": "Senator", "Rep": "Representative", "Capt": "Captain", "Lt": "Lieutenant",
    "Col": "Colonel", "Sgt": "Sergeant", "Cmdr": "Commander", "Rev": "Reverend", "Hon": "Honorable", "Pres": "President",
    "Cpl": "Corporal", "Maj": "Major", "Adm": "Admiral", "Fr": "Father", "Messrs": "Messieurs",
}
# fmt: on
# Before a number.
# fmt: off
_NUMBERED = {
    "no": "number", "nos": "numbers", "nr": "number", "fig": "figure", "figs": "figures", "vol": "volume", "vols": "volumes",
    "ch": "chapter", "chap": "chapter", "sec": "section", "sect": "section", "art": "article", "eq": "equation", "ex": "example",
    "tab": "table", "pg": "page", "p": "page", "pp": "pages", "pt": "part", "ep": "episode", "ed": "edition", "apt": "apartment",
    "rm": "room", "ste": "suite", "bldg": "building", "app": "appendix", "par": "paragraph", "rte": "route", "tel": "telephone",
    "ext": "extension", "approx": "approximately", "est": "established", "ca": "circa", "c": "circa", "max": "maximum", "min": "minimum",
    "avg": "average", "temp": "temperature", "ver": "version",
}
# fmt: on
# Anywhere; their full stop ends a sentence only before a capital or at the end.
# fmt: off
# fmt: off
_ABBREVIATIONS = {
    "vs": "versus", "approx": "approximately", "etc": "et cetera", "Inc": "Incorporated", "Ltd": "Limited", "Corp": "Corporation",
    "Co": "Company", "Bros": "Brothers", "Jr": "Junior", "Sr": "Senior", "dept": "department", "Dept": "Department", "govt": "government",
    "Govt": "Government", "Univ": "University", "Assn": "Association", "Ave": "Avenue", "Blvd": "Boulevard", "Rd": "Road",
    "Hwy": "Highway", "Pkwy": "Parkway", "Bldg": "Building", "Apt": "Apartment", "Jan": "January", "Feb": "February", "Apr": "April",
    "Aug": "August", "Sept": "September", "Sep": "September", "Oct": "October", "Nov": "November", "Dec": "December", "Tues": "Tuesday",
    "Thurs": "Thursday", "cf": "compare", "incl": "including", "excl": "excluding", "misc": "miscellaneous", "al": "al",
    "esp": "especially", "Esq": "Esquire", "Atty": "Attorney", "Supt": "Superintendent", "resp": "respectively", "max": "maximum",
    "avg": "average", "temp": "temperature", "tsp": "teaspoon", "tbsp": "tablespoon", "Mon": "Monday", "Tue": "Tuesday",
    "Wed": "Wednesday", "Thu": "Thursday", "Fri": "Friday", "hrs": "hours", "mins": "minutes", "lbs": "pounds",
}
# fmt: on
# fmt: on
# fmt: off
_PHRASES = {
    "i.e.": "that is", "e.g.": "for example", "a.k.a.": "also known as", "Ph.D.": "PHD", "Ph.D": "PHD", "PhD": "PHD", "M.D.": "MD",
    "B.Sc.": "BSC", "M.Sc.": "MSC", "No.1": "number one", "P.S.": "PS", "P.O.": "PO", "D.C.": "DC", "U.S.A.": "USA", "U.S.": "US",
    "U.K.": "UK", "E.U.": "EU", "U.N.": "UN", "aka": "also known as", "AKA": "also known as", "btw": "by the way", "BTW": "by the way",
    "FYI": "FYI", "TBD": "to be determined", "IMO": "in my opinion", "vs": "versus", "tv": "TV",
}
# fmt: on


def _title(match: Match) -> str | None:
    if match[1] in ("St", "Dr", "Mt", "Ft") and _after_street(match):
        return None
    return f"{_TITLES[match[1]]} "


def _after_street(match: Match) -> bool:
    """Whether "Elm St. It" ends a sentence: a name before the abbreviation and a word that starts sentences after it."""
    before = match.string[max(0, match.start() - 24) : match.start()]
    return re.search(r"[A-Z][a-z]+ $", before) is not None and _STARTER.match(match.string, match.end()) is not None


_STARTER = re.compile(
    r"(?:It|He|She|They|We|You|I|The|A|An|This|That|These|Those|There|Then|But|And|So|In|On|At|If|When|What|Who|Why|How|My|Our|His|Her)\b"
)


def _street(match: Match) -> str:
    name = f"{ordinal(match[1][:-3])} " if match[1][0].isdigit() else match[1]
    return name + _stopped(_STREETS[match[2]], match)


def _numbered(match: Match) -> str | None:
    word = match[1]
    spoken = _NUMBERED[word.lower()]
    return f"{spoken.capitalize() if word[0].isupper() else spoken} "


def _abbreviation(match: Match) -> str:
    return _stopped(_ABBREVIATIONS[match[1]], match)


def _phrase(match: Match) -> str:
    words = _PHRASES[match[1]]
    ended = match[0].endswith(".") and match[1] not in ("i.e.", "e.g.") and _ends_text_or_starts(match)
    return words + ("." if ended else "")


def _ends_text_or_starts(match: Match) -> bool:
    rest = match.string[match.end() :]
    return not rest.strip(" \n\t\"'”’)]") or _STARTER.match(rest.lstrip()) is not None


def _initialism(match: Match) -> str:
    """Return "U.S.S.R." as "USSR", with a full stop if a sentence ends there."""
    words = match[0].replace(".", "")
    return words + ("." if match[0].endswith(".") and _ends_text_or_starts(match) else "")


def _initial(match: Match) -> str | None:
    return None if _STARTER.match(match.string, match.end() + 1) else match[1]


# --- Roman numerals ---

_ROMAN_VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
_ROMAN = r"(?=[IVXLCDM])(M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3}))"
# fmt: off
_PARTS = [
    "Chapter", "Part", "Act", "Scene", "Section", "Volume", "Book", "Article", "Appendix", "Phase", "Type", "Level", "Stage", "Class",
    "Grade", "Unit", "Title", "Figure", "Table", "Lesson", "Episode", "Season", "Round", "Group", "Zone", "Step", "Rule", "War", "Bowl",
    "Fantasy", "Rocky", "Mark", "Apollo", "Olympiad", "Corps", "Canto", "Psalm", "Question", "Item", "Schedule", "Division",
]
# fmt: on
# fmt: off
_REIGNS = [
    "Henry", "Edward", "Richard", "George", "William", "Charles", "James", "Louis", "Elizabeth", "Mary", "Victoria", "Catherine", "Peter",
    "Alexander", "Nicholas", "Frederick", "Philip", "Ferdinand", "Napoleon", "Pius", "Benedict", "Francis", "Gregory", "Leo", "Clement",
    "Innocent", "Urban", "Paul", "John", "Ramses", "Ramesses", "Darius", "Xerxes", "Ptolemy", "Cleopatra", "Otto", "Rudolf", "Leopold",
    "Joseph", "Ivan", "Carl", "Gustav", "Gustavus", "Christian", "Haakon", "Harald", "Olav", "Juan", "Felipe", "Alfonso", "Albert",
    "Robert", "David", "Edmund", "Stephen", "Baldwin", "Constantine", "Theodosius", "Justinian", "Mehmed", "Suleiman", "Wilhelm",
    "Friedrich", "Umberto", "Vittorio", "Emmanuel", "Sam", "Thomas",
]
# fmt: on


def roman(text: str) -> str:
    """Return a Roman numeral's value in digits."""
    values = [_ROMAN_VALUES[letter] for letter in text]
    return str(sum(-value if value < later else value for value, later in zip(values, [*values[1:], 0], strict=True)))


def _roman_part(match: Match) -> str:
    return f"{match[1]} {cardinal(roman(match[2]))}"


def _roman_reign(match: Match) -> str | None:
    numeral = match[2]
    if numeral == "I" and _PRONOUN_I.match(match.string, match.end()):
        return None
    return f"{match[1]} the {ordinal(roman(numeral))}"


_PRONOUN_I = re.compile(r"\s+(?:am|have|do|can|think|know|like|love|want|see|need|don)\b|['’]")

# --- Names, files, hosts ---

# fmt: off
# fmt: off
_SUFFIXES = {
    "com": "com", "org": "org", "net": "net", "edu": "EDU", "gov": "gov", "io": "IO", "ai": "AI", "co": "co", "dev": "dev", "app": "app",
    "info": "info", "uk": "UK", "de": "DE", "py": "pie", "js": "JS", "ts": "TS", "md": "MD", "txt": "TXT", "json": "jason", "html": "HTML",
    "css": "CSS", "csv": "CSV", "pdf": "PDF", "exe": "EXE", "zip": "zip", "tar": "tar", "gz": "GZ", "png": "PNG", "jpg": "jpeg",
    "jpeg": "jpeg", "gif": "gif", "svg": "SVG", "doc": "doc", "docx": "doc X", "xls": "XLS", "xlsx": "XLSX", "ppt": "PPT", "pptx": "PPTX",
    "yaml": "yaml", "yml": "YML", "toml": "toml", "xml": "XML", "sh": "SH", "log": "log", "cfg": "CFG", "ini": "INI", "conf": "conf",
    "env": "ENV", "rs": "RS", "go": "go", "java": "java", "cpp": "CPP", "wav": "wave", "mp3": "MP three", "mp4": "MP four", "ogg": "ogg",
    "flac": "flack", "sql": "SQL", "db": "DB", "lock": "lock", "bak": "back", "tmp": "temp", "dmg": "DMG", "iso": "ISO", "bin": "bin",
    "dll": "DLL", "php": "PHP", "rb": "RB", "ipynb": "IPYNB", "plist": "P list",
}
# fmt: on
# fmt: on
# fmt: off
_SIGNS_IN_NAMES = {
    ".": "dot", "-": "dash", "_": "underscore", "@": "at", "+": "plus", "/": "slash", ":": "colon", "~": "tilde", "&": "ampersand",
}
# fmt: on
_NAME_PART = re.compile(r"\d+|[^\W\d_]+|[^\w]|_")


def spell_name(name: str, *, separators: bool = True) -> str:
    """Return a name of a file, host or mailbox: digits one by one, signs by name, short capitals as letters."""
    words = []
    parts = _NAME_PART.findall(name)
    for index, part in enumerate(parts):
        if part[0].isdigit():
            words.append(_digits_in_name(part, name))
        elif part in _SIGNS_IN_NAMES:
            words += [_SIGNS_IN_NAMES[part]] if separators or part == "." else []
        elif index and parts[index - 1] == "." and part.lower() in _SUFFIXES:
            words.append(_SUFFIXES[part.lower()])
        else:
            words.append(part.upper() if not _VOWEL.search(part) and len(part) < 6 else part)
    return " ".join(words)


def _digits_in_name(digits: str, name: str) -> str:
    is_round = re.fullmatch(r"[1-9]\d?00+", digits) is not None
    return cardinal(digits) if is_round or (len(digits) == 2 and digits[0] != "0" and "/" not in name) else spelled(digits)


_VOWEL = re.compile(r"[aeiouyAEIOUY]")


def _email(match: Match) -> str:
    return spell_name(match[0])


def _file_name(match: Match) -> str:
    return spell_name(match[0])


def _host(match: Match) -> str:
    return spell_name(match[0])


def _tag(match: Match) -> str:
    """Return a tag as it is: only text that was not cleaned up has any."""
    return match[0]


def _code(match: Match) -> str:
    return f"{match[1]}{' '.join(spelled(part) if part.isdigit() else part for part in re.findall(r'[0-9]+|[A-Za-z]+', match[2]))}"


def _named_number(match: Match) -> str:
    return f"{match[1]} {house_number(match[2])} {match[3]}".strip()


def _letters_and_number(match: Match) -> str | None:
    return None if match[1] == "I" else f"{match[1]} {house_number(match[2])}"


def _unknown_host(match: Match) -> str | None:
    """Return a name like "news.abc"; a common word after the full stop starts a sentence that lacks its space."""
    return None if match[0].rpartition(".")[2].upper() in _COMMON else spell_name(match[0])


def _handle(match: Match) -> str:
    return f"at {spell_name(match[1], separators=False)}"


def _hashtag(match: Match) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", match[1])
    return f"hashtag {re.sub('[0-9]+', lambda digits: f' {_counted(digits[0])} ', words)}".strip()


# --- The rest ---


def _range(match: Match) -> str:
    first, last = match[1], match[2]
    if _YEAR.fullmatch(first) and (_YEAR.fullmatch(last) or len(last) == 2):
        return f"{year(first)} to {year(last) if len(last) == 4 else _short_year(last)}"
    if float(first.replace(",", "")) > float(last.replace(",", "")) and (" " in match[0] or len(first) > 2):
        return f"{number(first)} {'minus ' if ' ' in match[0] else ''}{number(last)}"
    return f"{number(first)} to {number(last)}"


def _scaled(match: Match) -> str | None:
    if match[2] == "K" and len(match[1]) == 1:
        return f"{number(match[1])} K"  # a screen, a race
    return f"{_round(match[1])} {_MAGNITUDES[match[2].lower()]}"


def _ratio(match: Match) -> str:
    return f"{cardinal(match[1])} to {cardinal(match[2])}"


def _ordinal(match: Match) -> str | None:
    digits, suffix = match[1].replace(",", ""), match[2].lower()
    right = "th" if digits[-2:-1] == "1" else {"1": "st", "2": "nd", "3": "rd"}.get(digits[-1], "th")
    return ordinal(digits) if suffix == right else None


def _plain_number(match: Match) -> str:
    text = match[0]
    digits = text.lstrip("-−–")
    if _YEAR.fullmatch(text) and not _COUNTED.match(match.string, match.end()):
        return year(text)
    if match.start() and text[0] not in "-−–" and match.string[match.start() - 1] == "+":
        return number(digits)
    return number(text)


# A plural noun after four digits: "1500 people", "1234 files" are counts.
_COUNTED = re.compile(r"\s+(?!was\b|is\b|has\b|does\b|its\b|this\b|as\b|us\b|yes\b)(?:people|men|women|children|[a-z]{3,}(?<!s)s)\b")


def _plus_number(match: Match) -> str:
    return f"{number(match[1])} plus" if match[1] else "plus "


def _always(words: str) -> Reader:
    return lambda _match: words


# fmt: off
_SYMBOLS = {
    "&": "and", "%": "percent", "+": "plus", "@": "at", "°": "degrees", "º": "degrees", "§": "section", "¶": "paragraph", "©": "copyright",
    "®": "", "™": "", "=": "equals", "×": "times", "÷": "divided by", "±": "plus or minus", "≥": "at least", "≤": "at most",
    "≠": "is not equal to", "≈": "about", "√": "the square root of", "∞": "infinity", "π": "pi", "µ": "micro", "Ω": "ohm", "→": "to",
    "←": "", "↔": "to and from", "⇒": "implies", "#": "hash", "$": "dollar", "£": "pound", "€": "euro", "¥": "yen", "₹": "rupee",
    "₩": "won", "¢": "cents", "<": "less than", ">": "greater than", "~": "about", "^": "caret", "*": "", "_": "", "|": "",
    "\\": "backslash", "/": "slash", "•": "", "★": "star", "☆": "star", "−": "minus", "²": "squared", "³": "cubed", "‰": "per mille",
}
# fmt: on


def signs() -> dict[str, str]:
    """Return the words for each sign that the rules read by itself."""
    fractions = {sign: fraction(*unicodedata.normalize("NFKC", sign).split("\u2044")) for sign in _FRACTION_SIGNS}
    return _SYMBOLS | fractions | {form: words for form, words in _LITERALS.items() if len(form) == 1}


def _symbol(match: Match) -> str:
    return _SYMBOLS[match[0]]


def _last_digits(match: Match) -> str:
    return _counted(match[0]) if len(match[0]) <= _LONGEST_NUMBER else spelled(match[0])


def _superscript(match: Match) -> str:
    return _to_the(match[0].translate(_SUPERSCRIPTS))


def _subscript(match: Match) -> str:
    return spelled(match[0].translate(_SUBSCRIPTS))


def _contraction(match: Match) -> str:
    return f"{match[1]} are"


# --- Capitals ---

# fmt: off
_ACRONYMS = frozenset([
    "AI", "API", "ASAP", "ATM", "BBC", "CEO", "CFO", "CIA", "CNN", "CPU", "CSS", "CSV", "CTO", "DIY", "DNA", "DNS", "DVD", "EU", "FAQ",
    "FBI", "GDP", "GPS", "GPU", "HR", "HTML", "HTTP", "HTTPS", "IBM", "ID", "IDE", "IO", "IP", "IQ", "IRS", "ISO", "IT", "JPG", "JSON",
    "LLM", "MIT", "MRI", "NASA", "NATO", "NBA", "NFL", "NGO", "NHS", "NSA", "OECD", "OPEC", "OS", "PC", "PDF", "PHD", "PIN", "PM", "PR",
    "QA", "RAM", "RNA", "ROM", "RSS", "SDK", "SMS", "SQL", "SSD", "SSH", "SSL", "SUV", "TCP", "TLS", "TTS", "TV", "UAE", "UFO", "UI", "UK",
    "UN", "UNESCO", "UNICEF", "URL", "US", "USA", "USB", "UX", "VAT", "VIP", "VPN", "WHO", "WIFI", "WWW", "XML", "YAML", "ZIP", "AM",
])
# fmt: on
# fmt: off
_COMMON = frozenset([
    "A", "ALL", "AN", "AND", "ANY", "ARE", "AS", "AT", "BE", "BUT", "BY", "CAN", "DO", "FOR", "FROM", "GO", "GOT", "HAD", "HAS", "HAVE",
    "HE", "HER", "HIM", "HIS", "HOW", "IF", "IN", "INTO", "IS", "ITS", "MAY", "ME", "MUST", "MY", "NEVER", "NO", "NOT", "NOW", "OF", "OFF",
    "ON", "OR", "OUR", "OUT", "SHE", "SO", "STOP", "THAT", "THE", "THEIR", "THEM", "THEN", "THERE", "THEY", "THIS", "TO", "TOO", "UP",
    "VERY", "WAS", "WE", "WERE", "WHAT", "WHEN", "WHERE", "WHY", "WILL", "WITH", "YES", "YOU", "YOUR", "ONLY", "HERE", "PLEASE", "WARNING",
    "ALWAYS", "IT", "DON'T", "CAN'T",
])
# fmt: on
_SHOUTED = re.compile(r"\b[A-Z][A-Z'’]*(?:[ ,:;-]+[A-Z][A-Z'’]*){1,60}\b")
_ALONE = frozenset(
    [
        "IT",
        "NOT",
        "NO",
        "ALL",
        "ANY",
        "AND",
        "OR",
        "BUT",
        "IF",
        "IS",
        "ARE",
        "WAS",
        "DO",
        "SO",
        "TO",
        "OF",
        "ON",
        "IN",
        "VERY",
        "NEVER",
        "ALWAYS",
        "MUST",
        "YOU",
        "MY",
        "WE",
        "HE",
        "SHE",
        "NOW",
    ]
) - {
    "IT",
    "OR",
    "US",
}


def _shouted(match: Match) -> str | None:
    """Return words written in capitals in lower case; acronyms among them stay."""
    words = re.findall(r"[A-Z'’]+", match[0])
    if not any(len(word) > 1 and word in _COMMON for word in words):
        return None
    return re.sub(r"[A-Z][A-Z'’]*", lambda word: _lowered(word[0]), match[0])


def _lowered(word: str) -> str:
    keeps = word == "I" or (word in _ACRONYMS and word not in ("IT", "WHO", "US", "AM", "ID", "PIN", "ZIP")) or not _VOWEL.search(word)
    return word if keeps else word.lower()


def _emphasized(match: Match) -> str | None:
    return match[0].lower() if match[0] in _ALONE else None


def _words(table: Sequence[str] | dict[str, str]) -> str:
    return "|".join(sorted(map(re.escape, table), key=len, reverse=True))


_RULE_DECADE = re.compile(r"(?<![\w,.])['’]?(1[1-9]|20)?(\d)0['’]?s\b")
_ZONE = r"(?:\s?((?i:EST|EDT|CST|CDT|MST|MDT|PST|PDT|GMT|UTC|CET|CEST|BST|E\.S\.T|P\.S\.T|ET|PT)\b))?"
_SOFTWARE = "Python|python|iOS|macOS|Android|Node|Java|Ubuntu|Debian|Windows|Linux|Ruby|Swift|Go|Rust|PHP|version|Version|CUDA|Chrome|Firefox|Safari|Django|React|Xcode"
_TLD = "com|org|net|edu|gov|io|ai|co|dev|app|info|me|tv|uk|de|fr|us|eu|ca|au|jp|ch|it|es|nl|se|no|sm|xyz|tech|cloud"
_EXTENSION = _words(
    [
        suffix
        for suffix in _SUFFIXES
        if suffix not in ("com", "org", "net", "edu", "gov", "io", "ai", "co", "dev", "app", "info", "uk", "de")
    ]
)


def _rules(*rules: tuple[str, Reader]) -> list[tuple[regex.Pattern[str], Reader]]:
    return [(regex.compile(pattern), reader) for pattern, reader in rules]


# What may be short for something before a full stop or a hyphen; `\b[A-Z]` is an initial.
ABBREVIATED = "|".join(
    ["[A-Z]", _words([*_TITLES, *_ABBREVIATIONS, *_STREETS, *(day.capitalize() for day in _WEEKDAYS)]), f"(?i:{_words(_NUMBERED)})"]
)

# Patterns in the order they are tried.
RULES = _rules(
    (rf"(?<![\w/.])({_words(_LITERALS)})(?![\w/])", lambda match: _LITERALS[match[1]]),
    # names
    (r"(?<![\w+&-])[\w+-][\w.+&-]{0,63}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}\b(?!/)", _email),
    (rf"(?<![\w@./-])[A-Za-z0-9][\w-]{{0,63}}(?:[./-][A-Za-z0-9_][\w-]{{0,63}}){{0,6}}\.(?:{_EXTENSION})(?![\w/]|\.\w)", _file_name),
    (rf"(?<![\w@./:-])(?:[A-Za-z0-9][A-Za-z0-9-]{{0,62}}\.){{1,4}}(?:{_TLD})\b(?![\w/@]|\.[\w])", _host),
    (r"(?<![\w.@/-])[a-z][a-z0-9]{2,30}\.[a-z]{2,4}(?![\w./@])", _unknown_host),
    (r"(?<![\w@/])@([A-Za-z_]\w{0,40})", _handle),
    (r"(?<![\w&#/])#([A-Za-z]\w{0,60})(?![\w#$])", _hashtag),
    (
        r"(?<!\w)[A-Za-z]{2,10}://[\w.~:/?#@!$&'()*+,;=%-]{1,200}[\w/]|(?<![\w@.])(?:[\w-]{1,60}\.){1,4}[a-z]{2,12}/[\w.~:/%-]{0,200}[\w/]",
        _host,
    ),
    (r"</?[A-Za-z][\w-]{0,30}(?:=[^\s<>]{0,30})? ?/?>", _tag),
    # telephone numbers, addresses on a network, versions
    (
        r"(?<![\w.-])(\+?1[-. ]?\s?)?(\(\d{3}\)\s?-?\s?\d{3}[-. ]\d{4}|\d{3}-\d{3}-\d{4}(?:-\d{1,4})?|\d{3}\.\d{3}\.\d{4}|\d{3} \d{3}[- ]\d{4}|800-\d{3}-\d{4})(?:,? (?:ext\.?|x) ?(\d{1,6}))?(?![\w-]|[.]\d)",
        _phone,
    ),
    (r"(?<![\w.])\+(\d{1,3}(?:[ .-]\(?\d{1,5}\)?){2,6})(?![\w-])", _international),
    (r"(?<![\w.-])\d{3}-\d{4}(?![\w-]|[.]\d)", _digits_only),
    (r"(?<![\w.-])\d{3}-\d{2}-\d{4}(?![\w-])", _digits_only),
    (r"(?<![\w.])(\d{1,3}(?:\.\d{1,3}){3})(?::(\d{1,5}))?(?:/(\d{1,2}))?(?![\w]|\.\d)", _ip_address),
    # dates
    (rf"{_START}(\d{{4}})([-/.])(0?[1-9]|1[0-2])\2{_DAY}(?![\w/-])", lambda match: _numeric_date(match[3], match[4], match[1])),
    (r"(?<![\w/.-])(\d{1,2})([/.-])(\d{1,2})\2((?:1[5-9]|20)\d\d|(?<=/)\d\d)(?![\w/-]|[.]\d)", _us_date),
    (
        rf"\b{_WEEKDAY}{_MONTH}[ -]{_DAY}(?:st|nd|rd|th)?(?:\s?[-–—]\s?{_DAY}(?:st|nd|rd|th)?)?(?:(,? |-)(\d{{4}}))?(?![\w:%]|[.,/]\d|-\d)",
        _month_day,
    ),
    (
        rf"\b{_WEEKDAY}([Tt]he )?{_DAY}(?:st|nd|rd|th)?(?:\s?[-–—]\s?{_DAY}(?:st|nd|rd|th)?)?(?: of)?[ -]{_MONTH}(?:(,? |-)(\d{{4}}))?(?!\w)",
        _day_month,
    ),
    (rf"\b{_MONTH}(,? )(\d{{4}})(?![\w:%]|[.,]\d)", _month_year),
    (r"\bQ([1-4])[ ,']{0,2}()(?:(\d{4}|\d\d))\b()", _quarter),
    (r"\b()([1-4])Q(\d\d|\d{4})\b()", _quarter),
    (r"(?<![\w,.])((?:1[1-9]|20)\d0s)[-–]((?:1[1-9]|20)?\d0s)\b", _decade_range),
    (r"(?<![\w,.])['’‘]?(1[1-9]|20)?([1-9])0['’]?s\b", _decade),
    (r"(?<![\w,.])(1[1-9]|20)([1-9])0\ss\b", _decade),
    (r"(?<![\w,.])(1[1-9]|20)(0)0s\b", _decade),
    (r"(?<![\w,.])(\d{1,4}|\d,\d{3}) (A\.?D|B\.?C\.?E|B\.?C|C\.?E)\b\.?", _era),
    (rf"\b(Mon|Tues?|Weds?|Thu(?:rs?)?|Fri|Sat|Sun)\.?{_DASH}(Mon|Tues?|Weds?|Thu(?:rs?)?|Fri|Sat|Sun)\b\.?", _weekday_range),
    # times of day
    (rf"(?<![\w:.,$]){_CLOCK}\s?(?:{_HALF})?{_DASH}{_CLOCK}\s?(?:{_HALF})?(?![\w:]|[.,]\d)", _clock_range),
    (r"(?<![\w:.])(\d{1,2}):([0-5]\d):([0-5]\d)(?:\s?([AaPp])\.?[Mm]\b\.?)?(?![\w:])", _clock_seconds),
    (rf"(?<![\w:.,$]){_CLOCK}\s?{_HALF}{_ZONE}", _clock_time),
    (rf"(?<![\w:.])([01]?\d|2[0-4]):([0-5]\d)(?!:?\w){_ZONE}", _clock_plain),
    # money
    (
        rf"{_MINUS}{_CURRENCY}\s?([-−–])?({_NUM}){_MAGNITUDE}(?:{_DASH}([$£€¥₹₩])?({_NUM}){_MAGNITUDE})?{_PER}(?![\w@]|[.,]\d|[-–]\d)",
        _money,
    ),
    (rf"{_MINUS}{_CURRENCY}\s?([-−–])?({_NUM}){_MAGNITUDE}()()(){_PER}(?![\w@]|[.,]\d)", _money),
    (
        rf"{_MINUS}(?<![\w.,])(?:({_NUM}){_DASH})?({_NUM}|\d{{1,12}},\d\d?){_MAGNITUDE}\s?([$£€¥₹₩₽₺₿₴₪฿]|(?:{_SIGN_CODES})\b){_PER}(?![\w\d$])",
        _money_after,
    ),
    (rf"{_START}({_NUM})\s?¢", _cents),
    (rf"\b(\d{{1,5}})([A-Z])? {_STREET_WORDS}", _address),
    # mixed numbers and measures
    (
        rf"(?<![\w.,/])(?<!\w-)(?:(\d{{1,9}})[ -])?(\d{{1,9}}) ?[/⁄] ?(\d{{1,9}})(?:(?i:th|rd|nd|st)s?)?(?:\s?{_MEASURE}|(?![\w/]|[.,]\d| ?=))",
        _fraction,
    ),
    (rf"{_START}(?:(\d{{1,9}}) ?)?([{_FRACTION_SIGNS}])(?:\s?{_MEASURE})?", _fraction_sign),
    (rf"{_START}(\d{{1,3}})(?:'|′|’) ?(\d{{1,2}}(?:\.\d)?)(?:\"|″|''|”)(?!\w)", _feet_inches),
    (rf"{_START}(\d{{1,4}}(?:\.\d{{1,4}})?)[\"″](?!\w)", _inches),
    (rf"{_START}(?:(\d{{1,4}})['′]-)?(\d{{1,4}})['′](?![\w'-])", _feet),
    (rf"{_START}(\d{{1,6}}(?:\.\d{{1,6}})?(?:\s?[x×]\s?\d{{1,6}}(?:\.\d{{1,6}})?){{1,3}})(?:\s?{_MEASURE})", _dimensions),
    (
        r"(?<![\w.,=+*/-])(\d{1,6}(?:\.\d{1,6})?(?:[x×]\d{1,6}(?:\.\d{1,6})?){1,3})()(?![\w]|[.,]\d|\s?[=+])",
        _dimensions,
    ),
    (rf"{_START}({_SIGNED})(?:\s?({_UNIT}))?{_DASH}({_SIGNED})\s?{_MEASURE}", _measure_range),
    (rf"(?<![\w.,])({_SIGNED}){_BIG}\s?{_MEASURE}", _unit_measure),
    (rf"{_START}({_NUM})-({_UNIT}|[a-z]{{3,14}})\b", _adjective),
    (r"(?<![\w])(?:([Vv])\.?\s?)?(\d{1,6}(?:\.\d{1,6}){2,5})([-.]?(?:alpha|beta|rc|dev|post|a|b)\.?)?(\d{1,4})?\b(?!\.\d)", _version),
    (r"\b([Vv])\.?\s?(\d{1,6}(?:\.\d{1,6}){0,5})()()\b(?!\.\d)", _version),
    (rf"\b({_SOFTWARE})[ -](\d{{1,6}}\.\d{{1,6}})\b(?!\.\d)", _software_version),
    # arithmetic
    (
        rf"(?<![\w.,])(?:{_OPERAND} ?[-−–+*×x·÷/±^] ?){{1,12}}{_OPERAND} ?(?:[=≠≈≥≤<>]|[<>!=]=) ?{_OPERAND}(?: ?[-−–+*×x·÷/±^=] ?{_OPERAND}){{0,12}}(?![\w^²³])",
        _equation,
    ),
    (rf"(?<![\w.,])(?:[A-Za-zπ]|{_NUM}) ?(?:[=≠≈≥≤<>]|[<>!=]=) ?{_OPERAND}(?: ?[-−–+*×x·÷/±^=] ?{_OPERAND}){{0,12}}(?![\w^²³])", _equation),
    (rf"(?<![\w.,])(?:{_NUM}(?: ?[*×÷·±+] ?| [x/] )){{1,12}}{_NUM}(?![\w^]|[.,]\d)", _equation),
    (r"(?<!\w)(\d{1,9}(?:\.\d{1,9})?)[eE]([-+−]?\d{1,3})\b", _scientific),
    (r"(?<![<-])[-=]>|→", _always("to")),
    (r"(?<!\S)([<>]=?|[≥≤])\s?(?=[$£€]?\d)", lambda match: f"{_BOUNDS[match[1]]} "),
    (r"(?<=[\w)] )(?:[=≠≈≥≤<>]|[<>!=]=)(?= [\w-])", lambda match: _OPERATORS[match[0]]),
    (r"\b([A-Za-z]|\d{1,12}(?:\.\d{1,6})?)([⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,4}|\^-?\d{1,4})", _power),
    (rf"([√∛∜]) ?({_NUM}|[A-Za-z]\b)", _root),
    # places
    (rf"(?<=, )({'|'.join(_STATES)})(?:,? (\d{{5}}(?:-\d{{4}})?))?\b(?=[\s,.;)]|$)", _state),
    (r"(?<=[a-z]{3} )(\d{5})-(\d{4})\b", _digits_only),
    # words that stand before numbers
    (r"(?<=[Cc]all )[2-9]11\b|(?<=[Dd]ial )[1-9]\d\d\b", _digits_only),
    (r"(?<=ZIP )\d{5}\b|(?<=ZIP code )\d{5}\b", _digits_only),
    (rf"\b({'|'.join(_NAMED_BY_NUMBER)})[ -](\d{{3,4}})([A-Z]?)\b(?![.,]?\d|[-–:/]\d)", _named_number),
    (r"(?<![\w-])(?!UTC|GMT)([A-Z]{1,3})-?(\d{1,4})\b(?![\w/-]|[.,]\d)", _letters_and_number),
    (
        r"\b(\d{1,3})x(?= (?:faster|slower|more|less|better|bigger|larger|smaller|cheaper|higher|the|as)\b)",
        lambda match: f"{number(match[1])} times",
    ),
    (r"(?i:\b((?:ending in|pin|otp|pass ?code|password|code)(?: is|:)? ))((?=[a-z]{0,6}\d)[a-z0-9]{3,12})\b(?![-.]\w)", _code),
    (rf"\b(?i:({_words(_NUMBERED)}))\.\s?(?=[#\d])", _numbered),
    (r"\b(?i:(p|pp|fig|figs|no|vol|ch|sec|eq))\s(?=\d)", _numbered),
    (r"(?<=UTC|GMT)[-−](?=\d)", _always(" minus ")),
    (r"(?<![\w&])#\s?(?=\d)", _always("number ")),
    (rf"\b({'|'.join(_PARTS)})\s{_ROMAN}(?![\w'’])", _roman_part),
    (rf"\b(?i:(chapter|part|act|scene|section|volume|book|article|appendix|phase|type))\s{_ROMAN}(?![\w'’])", _roman_part),
    (rf"\b({'|'.join(_REIGNS)})\s{_ROMAN}(?![\w]|\.\w)", _roman_reign),
    (r"(?<=[A-Za-z] )((?=[IVX]{2,6}\b)(?:X{0,3})(?:IX|IV|V?I{0,3}))\b(?!['’.]\w)", lambda match: cardinal(roman(match[1]))),
    # abbreviations
    (rf"(?<![\w.])({_words(_PHRASES)})(?![\w])", _phrase),
    (rf"(?<![\w.])({'|'.join(_TITLES)})\.?\s(?=[A-Z])", _title),
    (rf"((?:\b[A-Z][\w'’]+|\b\d{{1,3}}(?:st|nd|rd|th)) )({'|'.join(_STREETS)})\b\.", _street),
    (rf"(?<![\w.])({_words(_ABBREVIATIONS)})\.(?!\w)", _abbreviation),
    (r"(?<![\w.])(?:[A-Z]\.){2,8}(?![\w])|(?<![\w.])(?:[A-Z]\.){1,8}[A-Z]\b", _initialism),
    (r"\b([A-Z])\.(?=\s[A-Z](?:[a-z]{2,}|\.))", _initial),
    (r"\b(What|Who|Where|When|Why|How|There|Here|what|who|where|when|why|how|there|here)['’]re\b", _contraction),
    (rf"\b(Mon|Tues?|Weds?|Thu(?:rs)?|Fri|Sat|Sun)(?=, (?:{'|'.join(_MONTH_NAMES)}|\d))", lambda match: _WEEKDAYS[match[1].lower()]),
    # numbers
    (r"(?<![\w.,-])(\d{1,3}(?:,\d{3}){1,10}|\d{1,36})((?i:st|nd|rd|th))\b", _ordinal),
    (rf"(?<![\w.,/-])({_NUM})(?:[-–—−]| [-–—−] )({_NUM})(?![\w/-]|[.,]\d|\s?=)", _range),
    (rf"(?<![\w.,])({_NUM})([kKMB]|bn|mn|mm)\b", _scaled),
    (r"(?<![\w:.,])(\d{1,3}):(\d{1,3})(?![\w:]|[.,]\d)", _ratio),
    (rf"(?<![\w.,])({_NUM})\+(?!\w)", _plus_number),
    (r"(?<![\w+)])\+(?=\d)", _always("plus ")),
    (r"(?<!\w)~\s?(?=[$£€]?\d)", _always("about ")),
    (rf"(?<![\w.,@/-]){_SIGNED}(?![\w@]|[.,]\d|[-–/@]\w)", _plain_number),
    (r"(?<![\w.,])\d{1,12},\d{1,2}(?![\w]|[.,]\d)", lambda match: number(match[0])),
    # capitals
    (_SHOUTED.pattern, _shouted),
    (r"(?<=[a-z,] )[A-Z]{2,6}\b(?=[ ,.!?])", _emphasized),
)

# What is left after the rules and the grammar: digits and symbols one by one.
LAST_RULES = _rules(
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,12}", _superscript),
    (r"[₀₁₂₃₄₅₆₇₈₉]{1,12}", _subscript),
    (r"[0-9]{1,36}", _last_digits),
    (f"[{re.escape(''.join(_SYMBOLS))}]", _symbol),
)
