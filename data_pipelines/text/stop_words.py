"""Stop words: words of a language with a grammatical function and no visual meaning."""

from __future__ import annotations

from collections.abc import Iterable

from xray.errors import ConfigError, nearest
from xray.files import lines_of, read_text

_LISTS = {
    "de": """
aber als am an auch auf aus bei bin bis da damit das dass dem den der des die dies diese diesem
diesen dieser dieses doch du durch ein eine einem einen einer eines er es euch für gegen hat
hatte ich ihm ihn ihr ihre im in ins ist ja kein keine mein mit nach nicht noch nur ob oder ohne
sehr sein seine seinem seinen seiner sich sie sind so und uns unser unter vom von vor war waren
was wenn wer wie wir wird wo zu zum zur zwischen über
""",
    "en": """
a about after all also am an and any are as at be been but by can could did do does each for from
had has have he her hers him his how i if in into is it its itself may me my no nor not of off
on onto or our out over own shall she should so some such than that the their them then there
these they this those to too up upon us very was we were what when where which while who whom
whose why will with would you your
""",
    "es": """
a al algo ante antes como con contra cual cuando de del desde donde durante el ella ellas ellos
en entre era eran es esa esas ese eso esos esta estas este esto estos está están fue ha han
hasta la las le les lo los me mi mis muy más ni no nos o para pero por porque que quien se ser
si sin sobre son su sus también te tu tus un una unas uno unos y ya yo él
""",
    "fr": """
a ai au aux avec ce ces cet cette ceux comme d dans de des du elle elles en entre est et eu il
ils j je l la le les leur leurs lui ma mais me mes mon n ne nos notre nous on ont ou où par pas
plus pour qu que qui s sa sans se ses si son sont sous sur ta te tes ton tu un une vos votre
vous y à été être
""",
    "it": """
a ad agli ai al alla alle allo anche c che chi ci come con cui d da dagli dai dal dalla dalle
dallo degli dei del della delle dello di dove e ed era gli ha hanno i il in io l la le lei lo
loro lui ma mi mia mio ne negli nei nel nella nelle nello noi non o per più quando quella quello
questa queste questi questo se si sia sono su sua sue sugli sui sul sulla sulle sullo suo suoi
tra tu un una uno voi è
""",
    "nl": """
aan al als bij dan dat de deze die dit door een en er geen had heb hebben heeft hem het hier hij
hoe hun ik in is je kan maar me met mijn na naar niet nog of om onder ons ook op over te tegen
toen tot tussen u uit van veel voor waar was wat we werd wie wij worden ze zich zij zijn zo zou
""",
    "pt": """
a ao aos as até com como da das de dela dele do dos e ela elas ele eles em entre era essa essas
esse esses esta estas este estes está estão eu foi há isso isto já lhe mais mas me meu minha
muito na nas nem no nos não nós o os ou para pela pelas pelo pelos por qual quando que quem se
sem ser seu seus sobre sua suas são também te tem um uma umas uns à às é
""",
}
LANGUAGES = tuple(_LISTS)


def stop_words(names: Iterable[str]) -> frozenset[str]:
    """Return the casefolded stop words of languages, and those of .txt files, one per line.

    Raises ConfigError for an unknown language and for a file that cannot be read.
    """
    words: set[str] = set()
    for name in names:
        if name.endswith(".txt"):
            words.update(line.strip() for line in lines_of(read_text(name, "stop_words")))
        elif name in _LISTS:
            words.update(_LISTS[name].split())
        else:
            raise ConfigError(
                f"stop_words={name}: there are lists for {', '.join(LANGUAGES)}; for another "
                f"language, give a .txt file with one word per line{nearest(name, LANGUAGES)}"
            )
    return frozenset(word.casefold() for word in words if word)
