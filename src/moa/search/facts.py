"""What calibration hides in real text: kinds of facts, and the questions about them."""

from typing import NamedTuple


class Fact(NamedTuple):
    """A kind of fact. Wordings and lengths of numbers differ from those of `moa.evaluation.tasks`, on purpose.

    Kinds differ in what a model has to look for: names that stand nowhere else and everyday words, before the value or
    after it, names of one word, of two words that others share, and codes, and values of digits and of words. Heads
    that only some of these need are missed by calibrating on others.
    """

    statement: str
    question: str
    answer: str
    keys: tuple[str, ...]
    values: int | tuple[str, ...]  # digits, or words


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
_GOODS = tuple(f"{city} {machine}" for city in _CITIES for machine in _MACHINES)
PLACES = tuple(
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
        PLACES,
    ),
)
