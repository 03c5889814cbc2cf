"""The tables of the rules for English: written forms and their words."""

from __future__ import annotations


def _table(text: str) -> dict[str, str]:
    """Return a table that is written as "form, form: words; form: words"."""
    entries = [entry.split(": ", 1) for entry in " ".join(text.split()).split("; ")]
    return {form: words for forms, words in entries for form in forms.split(", ")}


def _list(text: str) -> list[str]:
    """Return the words of a list."""
    return text.split()


# --- Numbers and dates ---

ONES = _list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
TENS = _list("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
SCALES = _list("thousand million billion trillion quadrillion quintillion sextillion septillion octillion nonillion decillion")
ORDINALS = _table("one: first; two: second; three: third; five: fifth; eight: eighth; nine: ninth; twelve: twelfth")
MONTH_NAMES = _list("January February March April May June July August September October November December")
WEEKDAY_NAMES = _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
QUARTERS = _list("first second third fourth")

# --- Money ---

MAGNITUDES = _table(
    "k, thousand: thousand; m, mn, mm, mio, million: million; b, bn, billion: billion; t, tn, trillion: trillion; hundred: hundred"
)
CURRENCIES = _table(
    """
    $: dollar/dollars/cent/cents; £: pound/pounds/penny/pence; €: euro/euros/cent/cents; ¥: yen/yen/sen/sen; ₹, Rs: rupee/rupees/paisa/paise;
    ₩: won/won/jeon/jeon; ₽: ruble/rubles/kopek/kopeks; ₺: lira/lira/kurus/kurus; ₿: bitcoin/bitcoins/satoshi/satoshis;
    ₴: hryvnia/hryvnias/kopiyka/kopiykas; ₪: shekel/shekels/agora/agorot; ฿: baht/baht/satang/satang; CNY, RMB: yuan/yuan/fen/fen;
    CHF: Swiss franc/Swiss francs/centime/centimes; MXN: Mexican peso/Mexican pesos/centavo/centavos; BRL: real/reais/centavo/centavos;
    SEK: Swedish krona/Swedish kronor/ore/ore; NOK: Norwegian krone/Norwegian kroner/ore/ore; DKK: Danish krone/Danish kroner/ore/ore;
    PLN: zloty/zlotys/grosz/groszy
    """
)
CODES = _table("USD: $; EUR: €; GBP: £; JPY: ¥; INR: ₹; KRW: ₩; RUB: ₽; BTC: ₿; TRY: ₺; UAH: ₴; ILS: ₪; THB: ฿")
DOLLARS = _table("US: US; C, CA, CAD: Canadian; A, AU, AUD: Australian; NZ: New Zealand; HK: Hong Kong; S: Singapore")
PERIODS = _table(
    """
    yr, y, year: year; mo, mth, month: month; wk, week: week; d, day: day; hr, h, hour: hour; min: minute; kg: kilogram; g: gram; lb: pound;
    oz: ounce; gal: gallon; mi: mile; km: kilometer; kWh: kilowatt hour; GB: gigabyte; person: person; user: user; unit: unit; night: night;
    share: share; sq: square; ea: each
    """
)

# --- Measures ---

UNITS = _table(
    """
    km: kilometer; m: meter; cm: centimeter; mm: millimeter; µm, μm: micrometer; nm: nanometer; kg, KG, Kg: kilogram; g: gram; mg: milligram;
    µg, μg, mcg: microgram; lb, lbs: pound; oz: ounce; ft: foot; in: inch; yd, yds: yard; mi: mile; l, L: liter; ml, mL: milliliter;
    cl: centiliter; gal: gallon; qt: quart; pt: pint; tsp: teaspoon; tbsp, Tbsp: tablespoon; ha: hectare; Hz: hertz; kHz: kilohertz;
    MHz: megahertz; GHz: gigahertz; KB, kB: kilobyte; MB: megabyte; GB: gigabyte; TB: terabyte; PB: petabyte; KiB: kibibyte; MiB: mebibyte;
    GiB: gibibyte; TiB: tebibyte; kbps: kilobit per second; Mbps, mbps: megabit per second; Gbps, gbps: gigabit per second; hr, hrs, h: hour;
    min, mins: minute; s, sec, secs: second; ms: millisecond; µs, μs: microsecond; ns: nanosecond; mph: mile per hour;
    kph, kmh: kilometer per hour; rpm: revolution per minute; bpm: beat per minute; fps: frame per second; dpi: dot per inch; W: watt;
    kW: kilowatt; MW: megawatt; GW: gigawatt; kWh: kilowatt hour; MWh: megawatt hour; mAh: milliamp hour; V: volt; mV: millivolt; kV: kilovolt;
    mA: milliamp; J: joule; kJ: kilojoule; kcal: kilocalorie; cal: calorie; N: newton; Pa: pascal; hPa: hectopascal; kPa: kilopascal; bar: bar;
    psi: PSI; dB: decibel; px: pixel; cc: CC; K: kelvin; Ω: ohm; kΩ: kiloohm; sq ft, sq. ft: square foot; sq mi, sq. mi: square mile; sq m, sq. m: square meter;
    cu ft, cu. ft: cubic foot; fl oz, fl. oz: fluid ounce; pct, %: percent; ‰: per mille; pp: percentage point; °C, ° C, ºC, ℃: degree Celsius;
    °F, ° F, ºF, ℉: degree Fahrenheit; °, º, deg: degree; ¢: cent
    """
)
IRREGULAR = _table("foot: feet; inch: inches; percent: percent; mille: mille; PSI: PSI; CC: CC; kelvin: kelvin") | {
    f"{prefix}hertz": f"{prefix}hertz" for prefix in ("", "kilo", "mega", "giga")
}
ATTRIBUTES = _table("feet: foot; inches: inch") | {
    f"{one}s": one for one in _list("dollar euro pound degree meter gram liter mile byte minute hour second watt volt")
}

# --- Signs ---

OPERATORS = _table(
    """
    -, −, –: minus; +: plus; *, ×, x, ·: times; ÷, /: divided by; =, ==: equals; ≠, !=: is not equal to; ≈: is about; ≥, >=: is at least;
    ≤, <=: is at most; >: is greater than; <: is less than; ±: plus or minus; ^: to the power of
    """
)
BOUNDS = _table(">: more than; <: less than; >=, ≥: at least; <=, ≤: at most")
GREEK_LETTERS = _list(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi psi omega"
)
ROOTS = _table("√: square; ∛: cube; ∜: fourth")
SYMBOLS = _table(
    r"""
    ®, ™, ←, *, _, |, •: ; &: and; %: percent; +: plus; @: at; °, º: degrees; §: section; ¶: paragraph; ©: copyright; =: equals; ×: times;
    ÷: divided by; ±: plus or minus; ≥: at least; ≤: at most; ≠: is not equal to; ≈, ~: about; √: the square root of; ∞: infinity; π: pi;
    µ: micro; Ω: ohm; →: to; ↔: to and from; ⇒: implies; #: hash; $: dollar; £: pound; €: euro; ¥: yen; ₹: rupee; ₩: won; ¢: cents;
    <: less than; >: greater than; ^: caret; \: backslash; /: slash; ★, ☆: star; −: minus; ²: squared; ³: cubed; ‰: per mille
    """
)
SIGNS_IN_NAMES = _table(
    ".: dot; -: dash; _: underscore; @: at; +: plus; /: slash; :: colon; ~: tilde; &: ampersand; ?: question mark; =: equals; %: percent; #: hash"
)

# --- Places ---

STREETS = _table(
    """
    St: Street; Ave: Avenue; Blvd: Boulevard; Rd: Road; Dr: Drive; Ln: Lane; Ct: Court; Pl: Place; Sq: Square; Hwy: Highway; Pkwy: Parkway;
    Expy: Expressway; Ter: Terrace; Cir: Circle
    """
)
STATES_TOO = frozenset(_list("OK OR IN ME HI OH MA PA"))  # words too
COMPASS = _table("N: North; S: South; E: East; W: West; NE: Northeast; NW: Northwest; SE: Southeast; SW: Southwest")
STATES = _table(
    """
    AL: Alabama; AK: Alaska; AZ: Arizona; AR: Arkansas; CA: California; CO: Colorado; CT: Connecticut; DE: Delaware; FL: Florida; GA: Georgia;
    HI: Hawaii; ID: Idaho; IL: Illinois; IN: Indiana; IA: Iowa; KS: Kansas; KY: Kentucky; LA: Louisiana; ME: Maine; MD: Maryland;
    MA: Massachusetts; MI: Michigan; MN: Minnesota; MS: Mississippi; MO: Missouri; MT: Montana; NE: Nebraska; NV: Nevada; NH: New Hampshire;
    NJ: New Jersey; NM: New Mexico; NY: New York; NC: North Carolina; ND: North Dakota; OH: Ohio; OK: Oklahoma; OR: Oregon; PA: Pennsylvania;
    RI: Rhode Island; SC: South Carolina; SD: South Dakota; TN: Tennessee; TX: Texas; UT: Utah; VT: Vermont; VA: Virginia; WA: Washington;
    WV: West Virginia; WI: Wisconsin; WY: Wyoming
    """
)

# --- Abbreviations ---

# Before a name.
TITLES = _table(
    """
    Mr: Mister; Mrs: Misses; Ms: Miz; Dr: Doctor; Prof: Professor; St: Saint; Mt: Mount; Ft: Fort; Gen: General; Gov: Governor; Sen: Senator;
    Rep: Representative; Capt: Captain; Lt: Lieutenant; Col: Colonel; Sgt: Sergeant; Cmdr: Commander; Rev: Reverend; Hon: Honorable;
    Pres: President; Cpl: Corporal; Maj: Major; Adm: Admiral; Fr: Father; Messrs: Messieurs
    """
)
# Before a number.
NUMBERED = _table(
    """
    no, nr: number; nos: numbers; fig: figure; figs: figures; vol: volume; vols: volumes; ch, chap: chapter; sec, sect: section; art: article;
    eq: equation; ex: example; tab: table; pg, p: page; pp: pages; pt: part; ep: episode; ed: edition; apt: apartment; rm: room; ste: suite;
    bldg: building; app: appendix; par: paragraph; rte: route; tel: telephone; ext: extension; approx: approximately; est: established;
    ca, c: circa; max: maximum; min: minimum; avg: average; temp: temperature; ver: version
    """
)
# Anywhere; their full stop ends a sentence only before a capital or at the end.
ABBREVIATIONS = _table(
    """
    vs: versus; approx: approximately; etc: et cetera; Inc: Incorporated; Ltd: Limited; Corp: Corporation; Co: Company; Bros: Brothers;
    Jr: Junior; Sr: Senior; dept: department; Dept: Department; govt: government; Govt: Government; Univ: University; Assn: Association;
    Ave: Avenue; Blvd: Boulevard; Rd: Road; Hwy: Highway; Pkwy: Parkway; Bldg: Building; Apt: Apartment; Jan: January; Feb: February;
    Apr: April; Aug: August; Sept, Sep: September; Oct: October; Nov: November; Dec: December; Mon: Monday; Tues, Tue: Tuesday; Wed: Wednesday;
    Thurs, Thu: Thursday; Fri: Friday; cf: compare; incl: including; excl: excluding; misc: miscellaneous; al: al; esp: especially;
    Esq: Esquire; Atty: Attorney; Supt: Superintendent; resp: respectively; max: maximum; avg: average; temp: temperature; tsp: teaspoon;
    tbsp: tablespoon; hrs: hours; mins: minutes; lbs: pounds
    """
)
PHRASES = _table(
    """
    i.e.: that is; I.e.: That is; e.g.: for example; E.g.: For example; a.k.a., aka, AKA: also known as; Ph.D., Ph.D, PhD: PHD; M.D.: MD; B.Sc.: BSC; M.Sc.: MSC;
    No.1: number one; P.S.: PS; P.O.: PO; D.C.: DC; U.S.A.: USA; U.S.: US; U.K.: UK; E.U.: EU; U.N.: UN; btw, BTW: by the way; FYI: FYI;
    TBD: to be determined; IMO: in my opinion; vs: versus; tv: TV
    """
)
LITERALS = _table(
    """
    24/7: twenty four seven; 24/7/365: twenty four seven, three sixty five; 9/11: nine eleven; 50/50, 50-50: fifty fifty; 20/20: twenty twenty; 401(k): four oh one k; C++, c++: C plus plus; .NET: dot net; CO2, CO₂: CO two; H2O, H₂O: H two O; O₂: O two; B2B: B to B; B2C: B to C; P2P: P to P;
    COVID-19, Covid-19, covid-19: covid nineteen; w/o: without; w/: with; b/c: because; c/o: care of; and/or: and or; he/she, she/he, s/he: he or she; his/her: his or her; him/her: him or her; yes/no: yes or no; he/him: he him;
    she/her: she her; they/them: they them; WWI, WW1: World War one; WWII, WW2: World War two;
    n/a, N/A: not applicable; R&D: R and D; Q&A: Q and A; R&B: R and B; AT&T: AT and T; I/O: IO; TCP/IP: TCPIP; km/h: kilometers per hour;
    MP3, mp3: MP three; MP4, mp4: MP four; №: number; ℃: degrees Celsius; ℉: degrees Fahrenheit
    """
)

# --- Files and hosts ---

ENDINGS = _table(
    """
    com: com; org: org; net: net; edu: EDU; gov: gov; io: IO; ai: AI; co: co; dev: dev; app: app; info: info; uk: UK; de: DE
    """
)
EXTENSIONS = _table(
    """
    py: pie; js: JS; ts: TS; md: MD; txt: TXT; json: jason; html: HTML; css: CSS; csv: CSV; pdf: PDF; exe: EXE; zip: zip; tar: tar; gz: GZ;
    png: PNG; jpg, jpeg: jpeg; gif: gif; svg: SVG; doc: doc; docx: doc X; xls: XLS; xlsx: XLSX; ppt: PPT; pptx: PPTX; yaml: yaml; yml: YML;
    toml: toml; xml: XML; sh: SH; log: log; cfg: CFG; ini: INI; conf: conf; env: ENV; rs: RS; go: go; java: java; cpp: CPP; wav: wave;
    mp3: MP three; mp4: MP four; ogg: ogg; flac: flack; sql: SQL; db: DB; lock: lock; bak: back; tmp: temp; dmg: DMG; iso: ISO; bin: bin;
    dll: DLL; php: PHP; rb: RB; ipynb: IPYNB; plist: P list
    """
)
SUFFIXES = ENDINGS | EXTENSIONS
TLD = "com|org|net|edu|gov|io|ai|co|dev|app|info|me|tv|uk|de|fr|us|eu|ca|au|jp|ch|it|es|nl|se|no|sm|xyz|tech|cloud"

# --- Words beside numbers ---

NAMED_BY_NUMBER = (
    r"Room|Flight(?: [A-Z0-9]{2})?|Highway|Route|Interstate|Suite|Apartment|Apt|Boeing|Airbus|Gate|Exit|Channel|Bus|Building|Studio|Unit|Area|Hwy\.?|Peugeot|"
    "Porsche|BMW|room|suite|apartment|flight|Seat|seat|Row|row|gate|Platform|platform|apt|unit"
)
SOFTWARE = (
    "Python|python|iOS|macOS|Android|Node|Java|Ubuntu|Debian|Windows|Linux|Ruby|Swift|Go|Rust|PHP|version|Version|CUDA|Chrome|Firefox|Safari|"
    "Django|React|Xcode"
)
PARTS = (
    "Chapter|Part|Act|Scene|Section|Volume|Book|Article|Appendix|Phase|Type|Level|Stage|Class|Grade|Unit|Title|Figure|Table|Lesson|Episode|"
    "Season|Round|Group|Zone|Step|Rule|War|Bowl|Fantasy|Rocky|Mark|Apollo|Olympiad|Corps|Canto|Psalm|Question|Item|Schedule|Division"
)
SMALL_PARTS = "chapter|part|act|scene|section|volume|book|article|appendix|phase|type"
REIGNS = (
    "Henry|Edward|Richard|George|William|Charles|James|Louis|Elizabeth|Mary|Victoria|Catherine|Peter|Alexander|Nicholas|Frederick|Philip|"
    "Ferdinand|Napoleon|Pius|Benedict|Francis|Gregory|Leo|Clement|Innocent|Urban|Paul|John|Ramses|Ramesses|Darius|Xerxes|Ptolemy|Cleopatra|Otto|"
    "Rudolf|Leopold|Joseph|Ivan|Carl|Gustav|Gustavus|Christian|Haakon|Harald|Olav|Juan|Felipe|Alfonso|Albert|Robert|David|Edmund|Stephen|"
    "Baldwin|Constantine|Theodosius|Justinian|Mehmed|Suleiman|Wilhelm|Friedrich|Umberto|Vittorio|Emmanuel|Sam|Thomas"
)

# --- Capitals ---

ACRONYMS = frozenset(
    _list("""
    AI AM API ASAP ATM BBC CEO CFO CIA CNN CPU CSS CSV CTO DIY DNA DNS DVD EU FAQ FBI GDP GPS GPU HR HTML HTTP HTTPS IBM ID IDE IO IP IQ IRS
    ISO IT JPG JSON LLM MIT MRI NASA NATO NBA NFL NGO NHS NSA OECD OPEC OS PC PDF PHD PIN PM PR QA RAM RNA ROM RSS SDK SMS SQL SSD SSH SSL
    SUV TCP TLS TTS TV UAE UFO UI UK UN UNESCO UNICEF URL US USA USB UX VAT VIP VPN WHO WIFI WWW XML YAML ZIP
    """)
)
# Acronyms that are words in a shouted sentence.
ALSO_WORDS = frozenset(_list("IT WHO US AM ID PIN ZIP"))
COMMON = frozenset(
    _list("""
    A ALL ALWAYS AN AND ANY ARE AS AT BE BUT BY CAN CAN'T DO DON'T FOR FROM GO GOT HAD HAS HAVE HE HER HERE HIM HIS HOW IF IN INTO IS IT ITS MAY
    ME MUST MY NEVER NO NOT NOW OF OFF ON ONLY OR OUR OUT PLEASE SHE SO STOP THAT THE THEIR THEM THEN THERE THEY THIS TO TOO UP VERY WARNING
    WAS WE WERE WHAT WHEN WHERE WHY WILL WITH YES YOU YOUR
    """)
)
EMPHASIZED = "NOT|NO|ALL|ANY|AND|BUT|IF|IS|ARE|WAS|DO|SO|TO|OF|ON|IN|VERY|NEVER|ALWAYS|MUST|YOU|MY|WE|HE|SHE|NOW"
