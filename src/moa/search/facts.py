"""What calibration hides in real text: kinds of facts, and the questions about them."""

from collections.abc import Sequence
from typing import NamedTuple


class Fact(NamedTuple):
    """A kind of fact. Wordings and lengths of numbers differ from those of `moa.evaluation.tasks`, on purpose.

    Kinds differ in what a model has to look for: names that stand nowhere else and everyday words, before the value or
    after it, names of one word, of two words that others share, and codes, values of digits and of words, and lines of
    prose, lists and tables. Heads that only some of these need are missed by calibrating on others.
    """

    statement: str
    question: str
    answer: str
    keys: Sequence[str]
    values: int | Sequence[str]  # digits, or words


_CITIES = tuple(
    "Aberdeen Bergen Cordoba Dresden Esbjerg Florence Geneva Hamburg Izmir Jakarta Krakow Lisbon Malmo Nagoya Odessa "
    "Porto Quito Rotterdam Seville Toulouse Utrecht Valencia Warsaw Zagreb".split()
)
_PEOPLE = tuple(
    "Alice Boris Clara David Elena Felix Greta Henry Irene Jonas Karen Louis Maria Nadia Oscar Paula Quentin Rosa "
    "Simon Tanya Ursula Victor Wanda Yusuf".split()
)
_SETTINGS = tuple(
    "alpha_relay beta_valve gamma_pump delta_gate epsilon_motor zeta_sensor theta_meter iota_switch kappa_fan "
    "lambda_coil omega_dial sigma_filter tau_heater phi_buffer chi_timer psi_cooler".split()
)
_MACHINES = tuple("tractor crane boiler turbine printer elevator freezer scanner compressor furnace mixer loom".split())
_EVERYDAY = (
    "flight number",
    "order number",
    "account number",
    "invoice number",
    "gate code",
    "door code",
    "room number",
)
_TEAMS = tuple(
    f"{color}-{animal}"
    for color in "amber cobalt crimson indigo ivory maroon scarlet teal violet bronze lilac ochre".split()
    for animal in "otter heron lynx walrus gecko moose tapir bison ferret magpie stork weasel".split()
)
_PARCELS = tuple(
    f"{first}{second}-{number}"
    for first, second, number in zip("BCDFGHJKLMNPQRST", "XWVZXKQPHJDRMTFG", range(118, 1000, 57), strict=False)
)
_DAYS = tuple(f"{day} {month}" for day in (2, 9, 17, 28) for month in "January March May July October".split())
_FOODS = "flour,butter,rye,oats,brown sugar,almonds,raisins,cocoa,semolina,rice,lentils,chickpeas".split(",")
_WARES = (
    "hiking boots,rain coats,wool socks,tea towels,desk lamps,picture frames,garlic presses,bicycle pumps,bath mats,"
    "coffee mugs"
).split(",")
_COUNTRIES = "Chile Denmark Egypt Finland Ghana Hungary India Jordan Kenya Laos Malta Nepal Oman Peru Qatar".split()
_OFFICES = "accounts,travel,housing,security,press,export,training,repairs,insurance,catering".split(",")
_TRAINS = tuple(f"{kind}-{number}" for kind in ("EC", "RB", "NX") for number in range(21, 99, 13))
_PICTURES = tuple(
    f"{size} {scene}"
    for size in "small large round square".split()
    for scene in "lighthouse orchestra winter bridge market skater".split()
)
_COLORS = "red blue green yellow purple orange white black pink gray".split()
_SHIPS = (
    "Morning Star,Silver Queen,Northern Pride,Blue Marlin,Old Captain,Lucky Penny,White Heron,Sea Fox,Far Horizon"
).split(",")
_VOUCHERS = tuple(
    f"{first}{second}{number}"
    for first, second, number in zip("KMPRTVXZBDFH", "QJWYGNLSCAEU", range(23, 1000, 81), strict=False)
)
_CABINS = tuple(
    f"{tree} {place}" for tree in "Birch Cedar Juniper Larch".split() for place in "Creek Hill Lodge Point".split()
)
_PARTS = tuple(
    f"{part}.{setting}"
    for part in "pump brake hatch winch".split()
    for setting in "max_speed min_load delay_ms retries".split()
)
_ROWS = tuple(str(number) for number in range(113, 1000, 37))
_CREWS = tuple(f"{mood}-{fish}" for mood in "hungry lucky quick loud".split() for fish in "trout herring pike".split())
_METALS = "copper,nickel,cobalt,silver,bronze,titanium,platinum,brass,chromium,tungsten,pewter,iridium".split(",")
_ROUTES = tuple(f"{letter}{number}" for letter in "KLPW" for number in range(11, 60, 9))
_BOOKS = (
    "The Long Winter,A Distant House,Nine Bridges,The Last Ferry,Under Glass,The Tin Crown,Salt Roads,The Red Door,"
    "Cold Harvest,The Paper Moon"
).split(",")
_WRITERS = "Abbott Barlow Carver Dalton Ellery Fenwick Garland Holt Ingram Jarvis Kendal Lowell".split()
_GOODS = tuple(f"{city} {machine}" for city in _CITIES for machine in _MACHINES)
_PLACES = tuple(
    "kitchen drawer,tool shed,green suitcase,piano bench,upper shelf,laundry room,wine cellar,old wardrobe,glove box,"
    "bottom cupboard".split(",")
)

FACTS = (
    Fact(
        "The harbor code for {key} is {value}.",
        "What is the harbor code for {key}?",
        "The harbor code for {key} is {value}.",
        _CITIES,
        6,
    ),
    Fact(
        "The phone number of {key} is {value}.",
        "What is the phone number of {key}?",
        "The phone number of {key} is {value}.",
        _PEOPLE,
        7,
    ),
    Fact(
        "Visitors of team {key} use badge {value}.",
        "Which badge do visitors of team {key} use?",
        "Visitors of team {key} use badge {value}.",
        _TEAMS,
        6,
    ),
    Fact(
        "Parcel {key} weighs {value} grams.",
        "How many grams does parcel {key} weigh?",
        "Parcel {key} weighs {value} grams.",
        _PARCELS,
        4,
    ),
    Fact(
        "The {key} was sold for {value} euros.",
        "For how many euros was the {key} sold?",
        "The {key} was sold for {value} euros.",
        _GOODS,
        4,
    ),
    Fact(
        "The serial number of the {key} is {value}.",
        "What is the serial number of the {key}?",
        "The serial number of the {key} is {value}.",
        _MACHINES,
        8,
    ),
    Fact('"{key}": {value},', 'What is the value of "{key}"?', 'The value of "{key}" is {value}.', _SETTINGS, 7),
    Fact("{value} is the {key}.", "What is the {key}?", "The {key} is {value}.", _EVERYDAY, 6),
    Fact(
        "Please keep the {key} in mind: {value}.",
        "Which {key} should you keep in mind?",
        "The {key} is {value}.",
        _EVERYDAY,
        4,
    ),
    Fact(
        "{key} left the keys in the {value}.",
        "Where did {key} leave the keys?",
        "{key} left the keys in the {value}.",
        _PEOPLE,
        _PLACES,
    ),
    Fact(
        "On {key} the station counted {value} visitors.",
        "How many visitors did the station count on {key}?",
        "On {key} the station counted {value} visitors.",
        _DAYS,
        4,
    ),
    Fact(
        "{value} grams of {key} go into the dough.",
        "How many grams of {key} go into the dough?",
        "The dough takes {value} grams of {key}.",
        _FOODS,
        4,
    ),
    Fact(
        "In the end {key} still owed the bank {value} crowns.",
        "How many crowns did {key} owe the bank?",
        "{key} owed the bank {value} crowns.",
        _PEOPLE,
        6,
    ),
    Fact("* {key}: {value} in stock", "How many {key} are in stock?", "There are {value} {key} in stock.", _WARES, 4),
    Fact("| {key} | {value} |", "Which number stands beside {key}?", "{value} stands beside {key}.", _COUNTRIES, 7),
    Fact(
        "Member {value} of the library is {key}.",
        "Which member of the library is {key}?",
        "{key} is member {value} of the library.",
        _PEOPLE,
        6,
    ),
    Fact(
        "For the {key} office, dial {value}.",
        "Which number do you dial for the {key} office?",
        "For the {key} office you dial {value}.",
        _OFFICES,
        4,
    ),
    Fact(
        "Train {key} carried {value} passengers last month.",
        "How many passengers did train {key} carry last month?",
        "Train {key} carried {value} passengers.",
        _TRAINS,
        6,
    ),
    Fact(
        "The picture of the {key} is insured for {value} dollars.",
        "For how many dollars is the picture of the {key} insured?",
        "The picture of the {key} is insured for {value} dollars.",
        _PICTURES,
        7,
    ),
    Fact(
        '"My favorite color is {value}," said {key}.',
        "What is the favorite color of {key}?",
        "The favorite color of {key} is {value}.",
        _PEOPLE,
        _COLORS,
    ),
    Fact(
        "The ship that came from {key} was called {value}.",
        "What was the ship from {key} called?",
        "The ship from {key} was called {value}.",
        _CITIES,
        _SHIPS,
    ),
    Fact(
        "The voucher of {key} reads {value}.",
        "What does the voucher of {key} read?",
        "The voucher of {key} reads {value}.",
        _PEOPLE,
        _VOUCHERS,
    ),
)

# Kinds that only validation sees: a plan that knows the wordings it was measured on by heart shows here.
HELD_OUT_FACTS = (
    Fact(
        "{key} cabin is rented for {value} francs a week.",
        "For how many francs a week is {key} cabin rented?",
        "{key} cabin is rented for {value} francs a week.",
        _CABINS,
        4,
    ),
    Fact("{key} = {value};", "What is {key} set to?", "{key} is set to {value}.", _PARTS, 6),
    Fact("[{key}] {value}", "Which number stands in row [{key}]?", "In row [{key}] stands {value}.", _ROWS, 7),
    Fact(
        "The {key} crew answers to the password {value}.",
        "To which password does the {key} crew answer?",
        "The {key} crew answers to the password {value}.",
        _CREWS,
        _METALS,
    ),
    Fact(
        "A ticket for bus {key} has the number {value}.",
        "Which number has a ticket for bus {key}?",
        "A ticket for bus {key} has the number {value}.",
        _ROUTES,
        6,
    ),
    Fact(
        "{value} is a novel by {key}.",
        "Which novel is by {key}?",
        "The novel by {key} is {value}.",
        _WRITERS,
        _BOOKS,
    ),
    Fact(
        "In the year of the flood {value} people lived in {key}.",
        "How many people lived in {key} in the year of the flood?",
        "In the year of the flood {value} people lived in {key}.",
        _CITIES,
        7,
    ),
    Fact(
        "Dear {key}, your reference is {value}.",
        "What is the reference of {key}?",
        "The reference of {key} is {value}.",
        _PEOPLE,
        8,
    ),
)
