"""How the catalogue is made: the rules by which drawings, classes and superclasses are chosen.

1. Candidates are the emoji of five groups (`GROUPS`): things, no faces, people, symbols or flags.
2. An artist's drawing of an emoji is found by its code points, else by its names; a name of two emoji is no name.
3. Drawings that fill a tile (`is_tile`) are left out: their silhouette is the tile's, not the thing's.
4. A class has both test artists and at least `MIN_TRAIN_ARTISTS` train artists.
5. Of emoji that differ by a detail one stays, and what is not one thing with one look goes (`LEFT_OUT`).
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from samantics.cache import atomic_path
from samantics.errors import StudyError
from samantics.mojiworld.catalogue import COLUMNS
from samantics.mojiworld.drawings import ARTISTS, Key, load_package, packages_dir, rasterised

GROUPS = ("Animals & Nature", "Food & Drink", "Activities", "Objects", "Travel & Places")  # as twemoji names them
MIN_TRAIN_ARTISTS, TEST_ARTISTS = 4, 2
NOVEL, INSTANCE_CLASSES = 20, 80
TILE_COVER = 0.93  # of its square box: round and pointed things cover less, and so do nearly all boxes

SUPERCLASSES: Mapping[str, str] = {
    "mammal": "bat bear boar camel cat chipmunk cow deer dog elephant ewe fox goat gorilla hamster horse koala "
    "leopard lion monkey mouse ox panda pig poodle rabbit ram rhinoceros tiger unicorn water-buffalo wolf",
    "bird": "baby-chick bird chicken dove duck eagle hatching-chick owl penguin rooster turkey",
    "sea animal": "blowfish crab dolphin fish octopus shark shrimp spiral-shell spouting-whale squid tropical-fish",
    "bug or reptile": "ant bug butterfly crocodile dragon frog honeybee lady-beetle lizard scorpion snail snake "
    "spider turtle",
    "plant": "blossom bouquet cactus cherry-blossom christmas-tree deciduous-tree evergreen-tree fallen-leaf "
    "four-leaf-clover herb hibiscus leaf-fluttering-in-wind maple-leaf mushroom palm-tree pine-decoration rose "
    "seedling sheaf-of-rice sunflower tanabata-tree tulip white-flower wilted-flower",
    "fruit or vegetable": "avocado banana carrot cherries chestnut cucumber ear-of-corn eggplant grapes hot-pepper "
    "kiwi-fruit lemon melon peach peanuts pear pineapple potato red-apple roasted-sweet-potato strawberry tangerine "
    "tomato watermelon",
    "meal": "bacon baguette-bread bread burrito cheese-wedge cooked-rice cooking croissant curry-rice egg "
    "fish-cake-with-swirl french-fries fried-shrimp green-salad hamburger hot-dog meat-on-bone oden pancakes pizza "
    "popcorn pot-of-food poultry-leg rice-ball rice-cracker shallow-pan-of-food spaghetti steaming-bowl "
    "stuffed-flatbread sushi taco",
    "sweet": "birthday-cake candy chocolate-bar cookie custard dango doughnut honey-pot ice-cream lollipop shaved-ice "
    "shortcake soft-ice-cream",
    "drink or tableware": "amphora baby-bottle beer-mug bottle-with-popping-cork clinking-glasses cocktail-glass "
    "fork-and-knife glass-of-milk hot-beverage kitchen-knife sake spoon teacup-without-handle tropical-drink "
    "wine-glass",
    "nature": "cloud cloud-with-lightning cloud-with-rain cloud-with-snow comet crescent-moon cyclone droplet fire "
    "full-moon globe-showing-europe-africa high-voltage mountain rainbow snowflake snowman sparkles star sun "
    "sun-behind-cloud tornado volcano water-wave wind-face",
    "town": "barber-pole building-construction bus-stop carousel-horse castle church circus-tent classical-building "
    "construction derelict-house factory ferris-wheel fountain fuel-pump hospital house japanese-castle moai mosque "
    "oil-drum police-car-light postbox roller-coaster school shinto-shrine stadium stop-sign synagogue tokyo-tower "
    "vertical-traffic-light wedding",
    "land vehicle": "ambulance articulated-lorry automobile bicycle bullet-train bus delivery-truck fire-engine "
    "kick-scooter locomotive metro minibus monorail motor-scooter motorcycle mountain-railway police-car racing-car "
    "railway-car sport-utility-vehicle taxi tractor tram trolleybus",
    "aircraft or boat": "airplane anchor canoe helicopter mountain-cableway passenger-ship rocket sailboat satellite "
    "ship small-airplane speedboat suspension-railway",
    "clothing": "bikini crown dress graduation-cap high-heeled-shoe jeans kimono mans-shoe martial-arts-uniform "
    "rescue-workers-helmet running-shirt running-shoe t-shirt top-hat womans-boot womans-clothes womans-hat "
    "womans-sandal",
    "accessory": "backpack briefcase closed-umbrella clutch-bag gem-stone glasses handbag lipstick prayer-beads purse "
    "reminder-ribbon ribbon ring shopping-bags sunglasses umbrella watch",
    "sport": "american-football badminton baseball basketball bow-and-arrow bowling boxing-glove bullseye "
    "cricket-game field-hockey fishing-pole flag-in-hole goal-net ice-hockey ice-skate ping-pong pool-8-ball "
    "rugby-football skis soccer-ball sports-medal trophy volleyball",
    "toy or party": "admission-tickets artist-palette balloon carp-streamer confetti-ball crystal-ball "
    "flower-playing-cards game-die jack-o-lantern japanese-dolls joker joystick mahjong-red-dragon military-medal "
    "party-popper performing-arts red-paper-lantern slot-machine video-game wind-chime wrapped-gift",
    "music or sound": "bell drum guitar headphone level-slider megaphone microphone musical-note musical-score "
    "postal-horn radio saxophone speaker-high-volume studio-microphone trumpet violin",
    "device": "battery camera clapper-board computer-mouse desktop-computer electric-plug fax-machine film-frames "
    "flashlight keyboard laptop light-bulb magnifying-glass-tilted-left microscope mobile-phone movie-camera "
    "optical-disk pager printer satellite-antenna telephone telephone-receiver telescope television trackball "
    "video-camera videocassette",
    "tool": "alembic balance-scale bomb chains clamp crossed-swords dagger gear hammer hammer-and-wrench key link "
    "locked nut-and-bolt old-key pick pill scissors shield syringe thermometer wrench",
    "household": "alarm-clock bathtub bed bellhop-bell candle cigarette coffin couch-and-lamp door funeral-urn "
    "hourglass-done mantelpiece-clock seat shopping-cart shower stopwatch timer-clock toilet wastebasket",
    "stationery": "ballot-box-with-ballot black-nib books card-index clipboard crayon credit-card dollar-banknote "
    "envelope file-cabinet file-folder inbox-tray label memo money-bag money-with-wings open-book package "
    "page-facing-up paintbrush paperclip pen pencil pushpin rolled-up-newspaper round-pushpin scroll spiral-calendar "
    "spiral-notepad straight-ruler triangular-ruler world-map",
}

LEFT_OUT: Mapping[str, str] = {  # reason -> the emoji, as a regular expression
    "a time on the face of one clock": r".*-(oclock|thirty)",
    "a phase of the moon, with or without a face": r"(new|waxing|waning|first|last)-.*moon.*|full-moon-face",
    "the head of an animal that is a class": r"(cat|cow|dog|dragon|horse|monkey|mouse|pig|rabbit|tiger)-face",
    "a trace or part of an animal": r"paw-prints|pig-nose|spider-web",
    "a state of a thing that is a class": r"airplane-(arrival|departure)|.*mailbox-.*|bell-with-slash|open-file-folder|"
    r"unlocked|locked-with-.*|mobile-phone-with-arrow|camera-with-flash|hourglass-not-done|umbrella-.*|outbox-tray|"
    r"(muted|speaker-(low|medium)).*|(incoming-)?envelope-?.*|e-mail|chart-.*|tear-off-calendar",
    "a thing that is a class, seen from another side": r"oncoming-.*|front-facing-.*|.*-tilted-right|train|station",
    "a thing that is a class, in another colour": r"(blue|green|orange)-book|green-apple|.*-decorative-cover|"
    r"(2nd|3rd)-place-medal|(euro|pound|yen)-banknote|dvd",
    "a thing that is a class, with a detail more or less": r"two-hump-camel|rat|shamrock|snowman-without-snow|"
    r"glowing-star|cloud-with-lightning-and-rain|sun-(behind-(large|small|rain)-cloud|with-face)|whale|globe-.*|rosette|"
    r"shooting-star|fork-and-knife-with-plate|ticket|ferry|motor-boat|fountain-pen|page-with-curl|1st-place-medal|"
    r"aerial-tramway|light-rail|high-speed-train|tram-car|horizontal-traffic-light|loudspeaker|film-projector",
    "several of a thing that is a class": r"clinking-beer-mugs|musical-notes|linked-paperclips|house(s|-with-garden)|"
    r"hammer-and-pick",
    "a building told from another by its sign only": r"bank|(love-)?hotel|(department|convenience)-store|.*post-office",
    "a landscape": r"beach-.*|bridge-at-night|camping|cityscape.*|desert.*|foggy|milky-way|moon-viewing-ceremony|"
    r"motorway|national-park|night-with-stars|railway-track|sun(rise|set).*|map-of-japan|fog",
    "a sign": r"(spade|club|heart|diamond)-suit|hot-springs",
    "different things by different artists": r"water-pistol|tennis|bookmark-tabs",
}

WRONG: Mapping[str, str] = {  # artist -> emoji whose name leads to something else there, or to a framed picture
    "openmoji": "scroll",
    "noto-v1": "cricket",
    "emojione": "cricket",
    "emojione-v1": "keyboard laptop shield",
    "streamline-emojis": "carousel-horse castle fountain rainbow roller-coaster ship turkey",
    "fxemoji": "construction game-die keyboard sunglasses umbrella",
}

RENAMED: Mapping[str, str] = dict(  # where an emoji's name is not what the thing is called (- stands for a blank)
    re.findall(
        r"(\S+)=(\S+)",
        "bottle-with-popping-cork=champagne bug=caterpillar building-construction=crane "
        "clinking-glasses=champagne-glasses construction=road-barrier cooking=frying-pan couch-and-lamp=couch "
        "deciduous-tree=tree dollar-banknote=banknote evergreen-tree=fir fish-cake-with-swirl=fish-cake "
        "flag-in-hole=golf-hole flower-playing-cards=playing-card globe-showing-europe-africa=globe "
        "high-voltage=lightning hot-beverage=coffee hourglass-done=hourglass lady-beetle=ladybird "
        "leaf-fluttering-in-wind=green-leaf magnifying-glass-tilted-left=magnifying-glass "
        "mahjong-red-dragon=mahjong-tile mans-shoe=shoe optical-disk=disk performing-arts=masks "
        "police-car-light=warning-light pool-8-ball=billiard-ball rescue-workers-helmet=helmet "
        "speaker-high-volume=speaker spouting-whale=whale t-shirt=shirt teacup-without-handle=tea "
        "vertical-traffic-light=traffic-light womans-boot=boot womans-clothes=blouse womans-hat=hat "
        "womans-sandal=sandal ",
    )
)


# ------------------------------------------------------------------------------------------------ making the tables


def candidates() -> dict[str, str]:
    """Code points -> Twemoji's name, of all emoji in `GROUPS`."""
    path = packages_dir() / "@iconify-json" / "twemoji" / "metadata.json"
    chars = load_package("twemoji").chars
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))["categories"]
        wanted = {icon for group in GROUPS for icon in groups[group]}
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(f"{path} cannot be read: run scripts/environment.sh again") from error
    return {code: icon for code, icon in sorted(chars.items()) if load_package("twemoji").find(icon) in wanted}


def emoji_names() -> dict[str, tuple[str, ...]]:
    """Code points -> the names by which artists call them, those with aliases too; never the name of two emoji."""
    names: dict[str, set[str]] = {}
    for artist in ARTISTS:
        package = load_package(artist)
        codes: dict[str, list[str]] = {}
        for code, icon in package.chars.items():
            names.setdefault(code, set()).add(icon)
            codes.setdefault(icon, []).append(code)
        for alias, entry in package.icons.get("aliases", {}).items():
            for code in codes.get(entry["parent"], []):
                names[code].add(alias)
    owners = Counter(name for several in names.values() for name in several)
    return {code: tuple(sorted(name for name in several if owners[name] == 1)) for code, several in names.items()}


def is_tile(image: Image.Image) -> bool:
    """Whether a cropped drawing is a filled, roughly square tile."""
    cover = float((np.asarray(image.getchannel("A")) >= 128).mean())
    return cover > TILE_COVER and 0.9 < image.width / image.height < 1.1


def write_catalogue(folder: Path | None = None) -> tuple[Path, Path]:
    """Make `catalogue.csv` and `instance_classes.csv` from the installed packages.

    Args:
        folder: where to; None: the library's own `assets`.

    Returns:
        The paths of both tables.

    Raises:
        StudyError: the packages are not there, or an emoji has neither a superclass nor a reason to be left out.
    """
    home = folder or Path(str(files("samantics").joinpath("assets")))
    table = made_catalogue()
    paths = home / "catalogue.csv", home / "instance_classes.csv"
    for path, content in zip(paths, (table, made_instance_classes(table)), strict=True):
        with atomic_path(path) as temporary:
            content.to_csv(temporary, index=False, lineterminator="\n")
    return paths


def made_catalogue() -> pd.DataFrame:
    """The catalogue as the rules make it: one row a drawing, ordered by superclass, class and artist."""
    superclass_of = {icon: name for name, icons in SUPERCLASSES.items() for icon in icons.split()}
    left_out = re.compile("|".join(LEFT_OUT.values()))
    names, rows, unplaced = emoji_names(), [], []
    for code, icon in candidates().items():
        if icon not in superclass_of and left_out.fullmatch(icon):
            continue
        drawn = drawings_of_emoji(code, icon, names.get(code, ()))
        splits = Counter(ARTISTS[artist].split for artist, _ in drawn)
        if splits["train"] < MIN_TRAIN_ARTISTS or splits["test"] < TEST_ARTISTS:
            continue
        if icon not in superclass_of:
            unplaced.append(icon)
            continue
        name = RENAMED.get(icon, icon).replace("-", " ")
        rows += [(code, name, superclass_of[icon], artist, found) for artist, found in drawn]
    if unplaced:
        raise StudyError(f"{', '.join(unplaced)}: write these emoji into SUPERCLASSES or LEFT_OUT of curation.py")
    order = {name: place for place, name in enumerate(SUPERCLASSES)}
    rows.sort(key=lambda row: (order[row[2]], row[1], list(ARTISTS).index(row[3])))
    return pd.DataFrame(rows, columns=COLUMNS)


def drawings_of_emoji(code: str, icon: str, names: Iterable[str]) -> list[Key]:
    """Every artist's drawing of an emoji, as (artist, icon); `icon` is Twemoji's name, `names` the others'."""
    drawn = []
    for artist in ARTISTS:
        package = load_package(artist)
        if icon in WRONG.get(artist, "").split():
            continue
        known = [package.chars[code]] if code in package.chars else [icon, *names]
        if artist == "fxemoji":
            known = [name.replace("-", "") for name in known]
        own = next((found for name in known if (found := package.find(name))), None)
        if own and not is_tile(rasterised(package.svg(own), 64)):
            drawn.append((artist, own))
    return drawn


def made_instance_classes(table: pd.DataFrame) -> pd.DataFrame:
    """`class, superclass, part` of the 80 classes of the instance data, chosen before any result by lot.

    Drawn by all nine artists; four of a superclass, in the 20 superclasses that have the most of them: three are base
    (60 in all), one is novel (20), so that base and novel classes have the same superclasses.
    """
    whole = table.groupby(["superclass", "class"], sort=False)["artist"].nunique()
    known = whole[whole == len(ARTISTS)].reset_index()
    known["lot"] = [zlib.crc32(name.encode()) for name in known["class"]]
    most = known["superclass"].value_counts(sort=False).nlargest(NOVEL).index
    chosen = known[known["superclass"].isin(most)].sort_values("lot").groupby("superclass", sort=False).head(4)
    order = chosen.sort_values(["superclass", "lot"])
    parts = np.tile(["base"] * (INSTANCE_CLASSES // NOVEL - 1) + ["novel"], NOVEL)
    return order.assign(part=parts).sort_index().reset_index(drop=True)[["class", "superclass", "part"]]
