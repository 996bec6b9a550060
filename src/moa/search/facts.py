"""What calibration hides in real text: kinds of facts, and the questions about them."""

from typing import NamedTuple


class Fact(NamedTuple):
    """A kind of fact. Wordings and lengths of numbers differ from those of `moa.evaluation.tasks`, on purpose.

    Kinds differ in what a model has to look for: names that stand nowhere else and everyday words, before the value or
    after it, and values of digits and of words. Heads that only some of these need are missed by calibrating on others.
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
PLACES = tuple(
    "kitchen drawer,garden shed,green suitcase,piano bench,upper shelf,laundry room,wine cellar,old wardrobe,glove box,"
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
        "The locker number of {key} is {value}.",
        "What is the locker number of {key}?",
        "The locker number of {key} is {value}.",
        _PEOPLE,
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
