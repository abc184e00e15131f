r"""
The judge: CIDEr, BLEU and ROUGE-L, equal to coco-caption's, in numpy, without Java.

    python cider.py results.json captions_val2017.json              # the table of scores
    python cider.py results.json captions_val2017.json show=5       # ... and the five best and worst captions
    python cider.py results.json captions_val2017.json out=s.json   # ... and every image's scores as json

results.json is a COCO results file, [{"image_id": 42, "caption": "a dog"}, ...], the other any COCO captions file.

CIDEr (Vedantam, Zitnick, Parikh 2015, https://arxiv.org/abs/1411.5726) asks: five people described the picture; does the candidate say
what they agree on, in words that say something? A caption becomes a vector with one entry for each n-gram g (n words in a row), its
tf-idf weight, term frequency times inverse document frequency:

    w(g) = how often the caption says g * ln(N / how many of the N images have g in a reference)

"a" is in the references of every image: ln(N / N) = 0, it counts nothing. "unicycle" is in few: it counts much. The candidate c meets
each reference r by the cosine of their vectors; the mean over references and over n = 1..4 is the image's score, the mean over images
the corpus's. What papers print is the variant CIDEr-D, which is harder to fool:

    CIDEr-D_n(c, r) = 10 * exp(-(|c| - |r|)^2 / (2 * 6^2)) * sum_g min(w_c(g), w_r(g)) * w_r(g) / (||w_c|| * ||w_r||)

The min clips: "dog dog dog" earns what the reference's one dog is worth. The Gaussian punishes a wrong length. The 10 makes the scale 0
to 10; tables print it x100. Two surprises follow from idf. An image scored alone gets 0: for N = 1 all logarithms are 0. And a subset's
score is not the mean of its images' scores within the whole, as N and the frequencies are its own: compare on equal splits, or give the
frequencies of a corpus, `df=`, as training on CIDEr does.

From formula to code: captions become tokens, tokens numbers (`index`). Sorting all n-grams (`ngrams`) makes a table with a row for each
(n-gram, sentence) pair, in which equal n-grams stand together: runs of them are the frequencies, and the candidate's row stands above
those of its references. The rest is sums over rows (`cider`).

Letters: N images; S sentences (each image's candidate, then its references); T words in all of them; n the order, 1..4; G different
n-grams; E different (n-gram, sentence) pairs; P (candidate, reference) pairs.
"""
import functools
import itertools
import json
import re
import unicodedata
from collections import Counter, defaultdict

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python cider.py name=value` overrides any of them

results: str = None         # COCO results file to judge
captions: str = None        # COCO captions file: the references
out: str = None             # write the scores, overall and of each image, to this json file
show = 0                    # >= 0: print so many of the best and of the worst captions

# ----------------------------------------------------------------------------------------------------------------------
# Tokens. Scores can be compared only if all cut words alike: as the Penn Treebank does, in the dialect of the Java
# program in coco-caption (CoreNLP 3.4.1). That is a lexer: of all rules, the longest match wins. Here the order of the
# rules makes the first match the longest. What no rule takes (commas, quotes, emoji) vanishes, as punctuation does
# anyway. Scans that may come to nothing are short, {0,30}: else "a,a,a,..." would take quadratic time.

NOT = "_²³¹¼-¾⁰-₉⅐-↉①-➓㆒-㆕㈠-㊿\U00010000-\U0010ffff"   # in Python's \w, but neither letter nor digit to Java
L, W, A = rf"[^\W\d{NOT}]", rf"[^\W{NOT}]", "[A-Za-z0-9]"  # a letter; a letter or digit; an ASCII letter or digit
M = "".join(c for c in map(chr, range(0x300, 0xED0)) if unicodedata.category(c) in ("Mn", "Mc"))
M = f"(?:[{M}]|&[aeiouAEIOU](?:acute|grave|uml);)"         # accents that come apart from their letter
Q, QQ, NT, CLITIC = "['’]", "['’‘‛]", "[nN][`'’‘‛][tT]", "(?i:[smd]|re|ve|ll)"  # apostrophes; n't; it's, they're
DOTTED, DOT = r"[A-Za-z](?:\.[A-Za-z])+", r"(?:\.(?=[,;:、]))?"  # U.S; the period of "dog.," is kept, as of "etc.,"
NAME = f"[dolDOL]{QQ}{L}"                                  # d'Angelo, O'Neill: two more letters at least
COMPOUND = f"{W}+(?:[-_֊‐‑](?:{NAME})?{W}+)*"              # snow-covered
URL, URL_END = r'[^\s"<>|()]', r'[^\s"<>|.!?(){},-]'       # the period after an address ends the sentence
PHONE, ALONE = r"[0-9]{3,4}[- \xa0]?[0-9]{3,5}", rf"(?!\w|-{W}|{Q}{CLITIC})"  # 123-4567; cannot, but not cannot-do
AREA_PHONE = rf"(?:[0-9]{{2,4}}[- \xa0])?[0-9]{{2,4}}[- \xa0]{PHONE}"
ABBREVIATED = """adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig bros calif
    capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det drs? elec ens esq est etc ext feb fla fri
    ft ga gen govs? hon inc ind insp intl invt jan jos jr jul jun kans? ky lieut lt ltd maj mar md messrs mfg mich minn
    mlle mme mo mon mont mrs? ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pptys pres profs?
    ptes? ptys? pvt rd reps? rev rt sens? sept? seq sfc sgt spc sq sr ste? supts? sys tel tenn thu thurs treas tues?
    univ va vs vt wed wisc? wm wyo"""
NUMBERED = r"(?i:nos?|figs?|art|ca|op|pp|prop)\."          # abbreviations only before a number: no. 5
CAPITAL = lambda text: "|".join(f"{word[0]}(?i:{word[1:]})" for word in text.split())
STATES = CAPITAL("Ark Az Del Ill La Mass Miss Ore Pa Tex Wash")  # abbreviations only with a capital: ore., la.
TWO_WORDS = {"cannot", "gotta", "gonna", "wanna", "lemme", "gimme"}  # each cut after the third letter
OPENERS = CAPITAL(r"""About According Additionally After An A As At But Earlier He Her Here However If In It Last Many
    More Mr\. Ms\. Now Once One Other Our She Since So Some Such That The Their Then There These They This We When While
    What Yet You""")

WORDS = [  # what begins with a letter or a digit
    rf"(?i:https?)://{URL}+{URL_END}",                              # http://dog.org/cat
    rf'{A}{URL}{{0,30}}@(?:[^\s"<>|().]+\.)*[^\s"<>|().]+',         # me@dog.org
    r'(?:www\.(?:[^\s"<>|.!?(){},]{1,30}\.){1,8}[A-Za-z]{2,4}'      # www.dog.tv/cat
    r"""|(?:[^\s!"$'(),-_`{|}]{1,30}\.){1,8}(?:com|net|org|edu))""" # dog.org
    rf"(?:/{URL}+{URL_END}|(?![\w-]|[.!?]{L}))",
    r"\d{1,2}/\d{1,2}-\d{2,4}|\d{1,4}[- \xa0]\d{1,4}(?:\\?/|⁄)\d{1,4}",  # 22 3/4: one token, with a space
    rf"(?=[0-9-]{{2,15}}[ \xa0]){AREA_PHONE}",                      # 555 123 4567: the same
    rf"{A}+(?:-[A-Za-z]+){{0,2}}(?:\\?/{A}+(?:-[A-Za-z]+){{0,2}}){{1,2}}|\d{{1,4}}⁄\d{{1,4}}",  # and/or, dark-red/blue
    rf"(?:{A}{{1,30}}[.,][A-Za-z0-9.,]{{0,30}}(?=-{A})|{A}+(?:-{A}+)*-{DOTTED}\.)"  # 1,000-foot, non-U.S.
    rf"(?:-(?:{DOTTED}\.|{A}+))*{DOT}",
    rf"(?:{DOTTED}|(?i:ph|ed)\.[dD])\.(?!{L})",                     # U.S., p.m., Ph.D.
    rf"{L}{W}*(?:[.!?]{L}{W}*)+{DOT}|{NUMBERED}(?=\s?\d)",          # dog.The: no space, no cut; no. 5
    rf"(?=[A-Za-z]{{2,7}}\.)(?:(?i:{'|'.join(ABBREVIATED.split())})|{STATES})\.",  # st.
    rf"[A-Za-z]\.(?!\s+(?:{OPENERS})\s)",                           # J. Crew; but "vitamin C. The dog" ends a sentence
    rf"(?i:s&ls|s&p-500|c\+\+|c#|cap{Q}n|c{Q}est|(?:pro|anti)-(?!{W}))",       # words on a list of the reference's,
    r"(?i:cont'd\.|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o`clock)",    # and the rest of that list
    rf"[A-Z]+(?:[+&][A-Z]+)+{DOT}|[A-Z]+\$|\d+(?:[.:,٫٬]\d+)+",     # AT&T, US$, 12:30
    rf"(?![a-zA-Z]{QQ}(?i:re|ve|ll)(?!{W})){NAME}{COMPOUND}{DOT}",  # d'oeuvres
    rf"(?i:dunkin|somethin|ol|[ldj]|y(?={Q}{L})){Q}(?!{CLITIC})",   # ol' dog, j'adore, y'all
    rf"[A-HJ-XZn]{QQ}(?!(?i:re|ve|ll)(?!{L})){L}{{2}}{L}*",         # B'Gosh
    rf"{L}{{2}}{L}*(?<=[aeiouyAEIOUY]){QQ}(?!{CLITIC}(?!{L}))[aeiouA-Z]{L}*",   # ma'am
    rf"{NT}|[A-Za-z]+(?<![nN])(?={NT})",                            # does|n't
    rf"(?i:{'|'.join(f'{word[:3]}(?={word[3:]}{ALONE})' for word in TWO_WORDS)})",  # can|not, gon|na
    rf"(?:{L}+|(?={M}))(?:{M}+{L}*)+|{COMPOUND}{DOT}"]              # e + accent; dog, 8th, dog_cat: nearly all there is
OTHERS = [
    r"[-x^=~<>']_[-x^=~<>']|\([-x^=~<>'][-_.]?[-x^=~<>']\)",        # ^_^ (-_-)
    r"[<>]?[:;=][-o*']?[()DPdpO\\{@|[\]](?=[^A-Za-z0-9])",          # :) ;-D
    rf"(?i:-[lr][rcs]b-)|\+{{1,2}}{AREA_PHONE}|\([0-9]{{2,3}}\)[ \xa0]?{PHONE}",  # -lrb-, +20 7946 0000, (555) 123-4567
    rf"(?i:'n'|{Q}n(?=\s|$)|’n’?|{Q}(?:em|till?|cause|[2-9]0s)|'t(?=is|was))|{Q}\d\d(?=\s)",    # 'n', 'em, '80s
    r"''|[`‘’‚‛“”„‟‹›«»]{2}|(?i:'(?:[smd](?![a-z])|(?:re|ve|ll)(?=[^a-z]))|’(?:[smd]|re|ve|ll))",  # quotes; dog|'s
    r"</?[A-Za-z][\w:-]*(?:[^\S\n]+[\w:-]+(?:[^\S\n]*=[^\S\n]*"     # <br/>, <a href="dog">
    r"""(?:"[^"<>\n]*"|'[^'<>\n]*'))?)*[^\S\n]*/?>|<[!?][A-Za-z-][^<>\n]*>|<<|>>""",
    rf"&(?:[lg]t|#\d+|HT|TL|UR|LR|QC|QL|QR|odq|cdq);|#{L}+|@[A-Za-z_][A-Za-z_0-9]*",  # &gt; #hashtag @dog
    r"[-+]?\d*(?:[.:,٫٬]\d+)+|[-+]\d+|\*+|(?:\\\*){1,3}|#+|@+|_+|[?!]+|-+|\.{3,5}"  # -5 .50 !! and, to drop, -- ...
    r"|[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)",                               # m²
    r"[$-&(-+/<=>[-^{|}~‚„‟¡-§©¬®°±´¶·¸¿¼½¾×÷;·։־׀׃׆׳״؀-؃؆-،ؔ؛؞؟٪٭۔܀-܍߶-߸।॥฿๏᾽‖‗†-‣‰-›※‾-⁂⁄⁺-⁾₊-₎₠₤€℀-⅏⅓-⅞←-⯿、。〒・"
    r"！-／：-＠［-･￠￡￥￦]|\n"]                                      # one symbol: $ % ½ ®; the end of a caption: see tokenize
LEXER = re.compile(f"(?={W}|{M})(?:{'|'.join(WORDS)})|{'|'.join(OTHERS)}")
SOCIAL = re.compile(rf"^\d\d|^\d\\?[/⁄]|<|(?<![\w'’.])(?:[A-Za-z]\.|{NUMBERED})")  # chunks that depend on neighbours

# how the reference writes what it found, and what coco-caption drops
CLEAN = {**dict.fromkeys(map(ord, "\n\r\v\f\x85\u2028\u2029"), " "), 0xAD: None, **dict(zip(range(0x91, 0x95), "‘’“”"))}
ENTITIES = {"&nbsp;": " ", "&apos;": "’", "&amp;": "&", "&quot;": '"', "&mdash;": "—", "&ndash;": "—", "&md;": "—"}
ENTITY = re.compile("|".join(ENTITIES), re.IGNORECASE)
BRACKETS = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "&lt;": "<", "&gt;": ">"}
STRAIGHT = str.maketrans({"‘": "`", "‛": "`", "‹": "`", "’": "'", "›": "'", "“": "``", "«": "``", "”": "''", "»": "''"})
WRITTEN = str.maketrans({"(": "-lrb-", ")": "-rrb-", " ": "\xa0", "¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$",
                         "\x80": "$", "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"})
DROPPED = set("'' ' `` ` . ? ! , : ; - -- --- ---- ... .... .....".split())


@functools.lru_cache(1 << 16)
def spell(token):
    """A token as the reference writes it, "" if it drops it. It drops -LRB- before it lowers the case: -lrb- stays."""
    if not token.isascii() and re.fullmatch(rf"[`‘’‚‛“”„‟‹›«»]+|’{CLITIC}|[nN]{QQ}[tT]", token):
        token = token.translate(STRAIGHT)
    token = BRACKETS.get(token, token).translate(WRITTEN).lower()
    return "" if token in DROPPED else token


def lex(line, *next_lines):
    """The tokens of a line, read in the light of the lines that follow it."""
    text = "\n".join(line.translate(CLEAN) for line in (line, *next_lines))
    text = ENTITY.sub(lambda match: ENTITIES[match[0].lower()], text)
    return [token for token in map(spell, itertools.takewhile("\n".__ne__, LEXER.findall(text))) if token]


def lex_chunk(chunk):
    """The tokens of what stands between two spaces, or None if they depend on what stands beyond."""
    if chunk.isascii() and chunk.isalpha() and chunk.lower() not in TWO_WORDS:
        return [chunk.lower()]  # nearly all there is
    return None if SOCIAL.search(chunk) else lex(chunk + " ")


# ----------------------------------------------------------------------------------------------------------------------
# From words to numbers. Sentences stand end to end in one flat array: a million small lists would cost seconds.


def number(sentences):
    """Lists of words -> the different words, all words as places in that list (T,), the lists' lengths (S,)."""
    ids, lengths = defaultdict(itertools.count().__next__), []  # what is looked up for the first time gets the next number

    def words():
        for sentence in sentences:
            lengths.append(len(sentence))
            yield sentence

    flat = np.fromiter(map(ids.__getitem__, itertools.chain.from_iterable(words())), np.int64)
    return list(ids), flat, np.array(lengths, np.int64)


def ranges(begin, many):
    """begin[0], begin[0] + 1, ..., many[0] of them, then begin[1], begin[1] + 1, ..."""
    end = np.cumsum(many)
    return np.arange(many.sum()) + np.repeat(begin - (end - many), many)


def expand(ids, lengths, flat, many):
    """
    Sentences, ids (T,) and lengths (S,) -> the same, where each id has given way to a list of others. These lists, one for each id,
    stand end to end in `flat`; `many` are their lengths.
    """
    if (many == 1).all():  # nearly always
        return flat[ids], lengths
    begin, many = (np.cumsum(many) - many)[ids], many[ids]  # (T,)
    ends = np.append(0, np.cumsum(many))[np.append(0, np.cumsum(lengths))]
    return flat[ranges(begin, many)], np.diff(ends)


def read(*texts):
    """
    Texts, lists of captions -> what `number` would say of all captions' tokens. A text has few different chunks: each is lexed once,
    unless its neighbours matter. Then the caption is lexed as a whole, with the beginning of the next two.
    """
    captions, ends = list(itertools.chain(*texts)), np.cumsum(list(map(len, texts)))
    chunks, ids, lengths = number(map(str.split, captions))
    tokens = list(map(lex_chunk, chunks))
    social = np.array([cut is None for cut in tokens], bool)[ids]  # (T,)
    whole = {*np.repeat(np.arange(len(captions)), lengths)[social].tolist(), *(ends[ends > 0] - 1).tolist()}  # a text's end matters
    begin, nothing = np.cumsum(lengths) - lengths, len(tokens)
    tokens.append([])
    for s in whole:
        here = ids[begin[s]:begin[s] + lengths[s]]
        here[:] = nothing
        here[:1] = len(tokens)  # the first chunk stands for the whole caption
        following = captions[s + 1:min(s + 3, ends[ends > s][0])]
        tokens.append(lex(captions[s], *(line[:30] for line in following)))
    words, *parts = number(cut or [] for cut in tokens)
    return words, *expand(ids, lengths, *parts)


def tokenize(captions):
    """
    captions (list of str) -> a list of tokens for each, in lower case, without punctuation. The reference reads the list as one text, a
    caption a line, and the next line can matter: the period of "letter X." goes if "The ..." follows. So give it what it got: all
    references in the file's order, and the candidates apart.
    """
    words, ids, lengths = read(captions)
    tokens = iter(np.array(words, object)[ids].tolist())
    return [list(itertools.islice(tokens, length)) for length in lengths.tolist()]


def index(candidates, references, tokenized):
    """
    Captions, or lists of tokens -> image (S,), the image of each sentence; whole, the words (T,) and lengths (S,) as ROUGE takes them;
    split, the same for CIDEr and BLEU, to which "22 3/4", held together by a no-break space, is two words; vocabulary, what the numbers
    in split stand for. The sentences of an image are its candidate, then its references.
    """
    flat = list(itertools.chain.from_iterable(references))
    words, ids, lengths = number(itertools.chain(candidates, flat)) if tokenized else read(candidates, flat)
    images = np.arange(len(references))
    image = np.concatenate([images[:len(candidates)], np.repeat(images, list(map(len, references)))])
    order = np.argsort(image, kind="stable")  # (S,)
    ids, lengths = ids[ranges((np.cumsum(lengths) - lengths)[order], lengths[order])], lengths[order]
    vocabulary, *parts = number(map(str.split, words))
    return image[order], (ids, lengths), expand(ids, lengths, *parts), vocabulary


def changes(*columns):
    """True where a row of the columns differs from the row above."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new


# ----------------------------------------------------------------------------------------------------------------------
# CIDEr. All n-grams are counted by sorting: equal ones come to stand together.


def ngrams(words, lengths):
    """
    For n = 1..4: gram, sentence, tf (E,), first (G,). Row e: n-gram gram[e] is tf[e] times in sentence[e]; rows in the order of
    n-grams, then sentences. words[first[g]:][:n] spells n-gram g.
    """
    T, V = len(words), int(words.max(initial=0)) + 1
    place, bits = np.arange(T, dtype=np.int32), T.bit_length()
    sentence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # (T,)
    left = np.repeat(np.cumsum(lengths, dtype=np.int32), lengths) - place  # (T,) words from here to the end of the sentence
    at = np.zeros(T, np.int32)  # (T,) which (n-1)-gram begins here
    for n in 1, 2, 3, 4:
        if int(at.max(initial=0) + 1) * V >= 1 << (63 - bits):
            raise ValueError(f"{T} words are too many at once: score them in parts, with df=")
        size = len(words[n - 1:])
        packed = at[:size] * np.int64(V) + words[n - 1:]  # an n-gram is the (n-1)-gram here and one word more
        packed = np.sort((packed << bits | place[:size])[left[:size] >= n])  # n-gram above, place below: far faster than argsort
        start = packed & ((1 << bits) - 1)
        new = changes(packed >> bits)
        at[start] = gram = np.cumsum(new, dtype=np.int32) - 1
        said = sentence[start]
        row = np.flatnonzero(new | changes(said))
        yield gram[row], said[row], np.diff(row, append=len(gram)), start[new]


def spelled(words, first, n, vocabulary):
    """The n-grams that begin at words[first], as tuples of strings."""
    return map(tuple, np.array(vocabulary, object)[words[first[:, None] + np.arange(n)]].tolist())


def document_frequencies(references):
    """
    Tokens of a corpus, a list of token lists for each image -> {("a", "dog"): number of images that have it}, with N under (). N-grams
    of a single image are left out: what is not in it counts as 1.
    """
    image, _, (words, lengths), vocabulary = index([], references, tokenized=True)
    df = {(): len(references)}
    for n, (gram, sentence, _, first) in enumerate(ngrams(words, lengths), 1):
        images = np.bincount(gram[changes(gram, image[sentence])], minlength=len(first))
        df.update(zip(spelled(words, first[images > 1], n, vocabulary), images[images > 1].tolist()))
    return df


def cider(words, lengths, image, vocabulary, df=None):
    """
    CIDEr-D of each image (N,) (eq. 1-3 and section 6 of the paper), and from the same tables what BLEU wants, matches (4, N): n-grams
    of the candidate in its references, each at most as often as in the one that says it most.
    """
    is_candidate = changes(image)  # (S,)
    candidate, S, N = np.flatnonzero(is_candidate), len(lengths), int(image[-1]) + 1
    similarity, matches = np.zeros(S), np.zeros((4, N))
    for n, (gram, sentence, tf, first) in enumerate(ngrams(words, lengths), 1):
        own = is_candidate[sentence]  # (E,)
        top = changes(gram, image[sentence])  # (E,) first row of an n-gram in an image: the candidate's, if it says it
        unheard = own & np.append(top, True)[1:]  # ... and no reference does
        if df is None:
            images = np.bincount(gram[top & ~unheard], minlength=len(first))  # candidates don't count
        else:
            images = np.array([df.get(g, 0) for g in spelled(words, first, n, vocabulary)])
        idf = np.log((N if df is None else df[()]) / np.maximum(1, images))  # (G,) exactly 0 for what every image has
        weight = tf * idf[gram]  # (E,)
        norm = np.sqrt(np.bincount(sentence, weight ** 2, S))  # (S,)

        heard = np.flatnonzero(own & ~unheard)  # (H,) candidates' rows with rows of references below them,
        tops = np.append(np.flatnonzero(top), len(top))
        many = tops[np.searchsorted(tops, heard) + 1] - heard - 1  # (H,) so many,
        r, c = ranges(heard + 1, many), np.repeat(heard, many)  # that is, pairs of rows r and c
        dot = np.bincount(sentence[r], np.minimum(weight[c], weight[r]) * weight[r], S)
        norms = norm * norm[candidate][image]
        similarity += np.divide(dot, norms, out=np.zeros(S), where=norms > 0)
        if len(heard):
            most = np.maximum.reduceat(tf[r], np.cumsum(many) - many)
            matches[n - 1] = np.bincount(image[sentence[heard]], np.minimum(tf[heard], most), N)
    bigrams = np.maximum(lengths - 1, 0)  # what the reference takes for the length
    similarity *= np.exp(-(bigrams[candidate][image] - bigrams) ** 2 / (2 * 6.0 ** 2))
    return 10 * np.bincount(image, similarity, N) / 4 / (np.bincount(image) - 1), matches


# ----------------------------------------------------------------------------------------------------------------------
# BLEU and ROUGE-L


def bleu(matches, lengths, image):
    """
    BLEU-1..4 of the corpus (4,), which is not the mean of its images', and of each image (4, N) (Papineni et al. 2002, section 2.3):
    the geometric mean of the precisions, matches / n-grams of the candidate, times exp(1 - r/c) if its length c is below that of the
    closest reference, r. The tiny numbers are the reference's, and show: where no 4-gram matches, BLEU-4 is about 1e-4, not 0.
    """
    candidate = np.flatnonzero(changes(image))
    c, longest = lengths[candidate], lengths.max()
    off = np.abs(lengths - c[image])  # (S,)
    off[candidate] = longest + 1
    closest = off == np.minimum.reduceat(off, candidate)[image]
    r = np.minimum.reduceat(np.where(closest, lengths, longest), candidate)  # (N,) of two as close, the shorter
    tries = np.maximum(c - np.arange(4)[:, None], 0)  # (4, N)

    def formula(matches, tries, c, r):
        product = np.cumprod((matches + 1e-15) / (tries + 1e-9), 0)
        mean = np.stack([product[n - 1] ** (1 / n) for n in (1, 2, 3, 4)])
        return mean * np.exp(np.minimum(0, 1 - 1 / ((c + 1e-15) / (r + 1e-9))))

    return formula(matches.sum(1), tries.sum(1), c.sum(), r.sum()), formula(matches, tries, c, r)


def lcs(words, lengths, a, b):
    """
    Length of the longest common subsequence of sentences a[p] and b[p], (P,), by bit vectors (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited"): a row of the usual table, which rises by 0 or 1 from word to word of the longer sentence, is one whole
    number with a 0 where it rises; an addition, whose carries run along it, makes the next row.
    """
    begin, length = np.cumsum(lengths) - lengths, np.zeros(len(a), np.int64)
    short, long = np.where(lengths[a] < lengths[b], (a, b), (b, a))
    width = 8 << np.searchsorted(8 << np.arange(40), lengths[long])  # (P,) bits: 8, 16, 32, ...

    def padded(s, size, pad):  # sentences (p,) -> words (p, size)
        place = np.arange(size)
        return np.where(place < lengths[s, None], words[np.minimum(begin[s, None] + place, len(words) - 1)], pad)

    def pack(bits):  # (p, width) -> whole numbers (p,); beyond 64 bits, Python's
        packed = np.packbits(bits.ravel(), bitorder="little").reshape(len(bits), -1)  # with axis=1, 50 times slower
        if bits.shape[1] <= 64:
            return packed.view(f"<u{packed.shape[1]}")[:, 0]
        return np.array([int.from_bytes(row.tobytes(), "little") for row in packed], object)

    for w in np.unique(width).tolist():
        same_width = np.flatnonzero(width == w)
        same_width = same_width[np.argsort(lengths[short[same_width]])]
        size = max(1, 2**16 // w)  # so many at a time stay in the processor's cache
        for p in np.split(same_width, range(size, len(same_width), size)):
            text = padded(long[p], w, -1)
            flat = pack(np.ones(text.shape, bool))
            for word in padded(short[p], lengths[short[p]].max(), -2).T:
                match = flat & pack(text == word[:, None])
                flat = (flat + match) | (flat - match)
            if w <= 64:
                length[p] = w - np.unpackbits(flat.view(np.uint8)).reshape(text.shape).sum(1)
            else:
                length[p] = [w - (row & ((1 << w) - 1)).bit_count() for row in flat]
    return length


def rouge_l(words, lengths, image, beta=1.2):
    """
    ROUGE-L of each image (N,) (Lin 2004, eq. 2-4): F of precision lcs / |c| and recall lcs / |r|, each the best of the references. A
    caption without words is one word to it, "", that even matches another's.
    """
    candidate, r = np.flatnonzero(changes(image)), np.flatnonzero(~changes(image))
    c = candidate[image[r]]
    common = np.zeros(len(lengths))
    common[r] = np.where((lengths[c] == 0) & (lengths[r] == 0), 1, lcs(words, lengths, c, r))
    lengths = np.maximum(lengths, 1)
    precision = np.maximum.reduceat(common / lengths[candidate][image], candidate)
    recall = np.maximum.reduceat(common / lengths, candidate)
    return (1 + beta ** 2) * precision * recall / np.maximum(recall + beta ** 2 * precision, 1e-9)


def evaluate(candidates, references, df=None, tokenized=False):
    """
    candidates, N strings, and references, N lists of strings -> scores {metric: float}, per_image {metric: (N,)}; CIDEr runs from 0 to
    10. df: document_frequencies of another corpus. tokenized: each string is a list of tokens already.
    """
    kind, what = ((list, tuple), "a list of tokens") if tokenized else (str, "a string")
    if not 0 < len(candidates) == len(references):
        raise ValueError(f"{len(candidates)} candidates, but references of {len(references)} images")
    for i, (candidate, refs) in enumerate(zip(candidates, references)):
        if not isinstance(refs, (list, tuple)) or not refs:
            raise ValueError(f"image {i} has no references: a list of at least one is needed, not {refs!r:.60}")
        for sentence in (candidate, *refs):
            if not isinstance(sentence, kind):
                raise ValueError(f"image {i}: not {what}: {sentence!r:.60}")
    if df is not None and () not in df:
        raise ValueError("df= lacks the number of images, df[()]: make it with document_frequencies")
    image, whole, (words, lengths), vocabulary = index(candidates, references, tokenized)
    if not lengths[~changes(image)].any():
        raise ValueError(f"all references are empty, those of image 0 to those of image {image[-1]}")
    consensus, matches = cider(words, lengths, image, vocabulary, df)
    corpus, each = bleu(matches, lengths, image)
    rouge = rouge_l(*whole, image)
    names = "CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"
    scores = map(float, (consensus.mean(), *corpus, rouge.mean()))
    return dict(zip(names, scores)), dict(zip(names, (consensus, *each, rouge)))


# ----------------------------------------------------------------------------------------------------------------------
# the command line


def read_captions(path):
    """
    A COCO captions file -> (images, captions): the entries of its "images", and for each of them
    the list of its captions. This is the one check of a data set: ids are unique, captions are
    strings with a word in them, every image has one. Annotations of images that "images" does not
    list are left out, as coco-caption leaves them. Without "images", the annotations say which
    images there are. Raises ValueError with one line for a person.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
        annotations = content["annotations"]
        rows = [(str(row["image_id"]), row["caption"]) for row in annotations]
        named = dict.fromkeys(name for name, _ in rows)
        images = content.get("images", [dict(id=name) for name in named])
        ids = [str(image["id"]) for image in images]
        names = [image.get("file_name", "") for image in images]
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise ValueError(f'{path} is not a COCO captions file, which has "images" (id, file_name) '
                         f'and "annotations" (image_id, caption): {type(problem).__name__} {problem}')
    captions = {name: [] for name in ids}
    if len(captions) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"{path}: two images have the id {twice}: each needs its own")
    for image, name in zip(images, names):
        if not isinstance(name, str) or ("file_name" in image and not name):
            raise ValueError(f"{path}: the file_name of image {image['id']} is {name!r}, not a name")
    for image, caption in rows:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{path}: a caption of image {image} is {caption!r}, not text")
        if image in captions:
            captions[image].append(caption)
    silent = [name for name in ids if not captions[name]]
    if silent or not images:
        raise ValueError(f"{path}: {len(silent)} of {len(images)} images have no caption, such as "
                         f"image_id {', '.join(silent[:5])}")
    return images, list(captions.values())


def read_results(path):
    """A COCO results file -> {image id, as a string: its caption}. Raises ValueError, likewise."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = [(str(row["image_id"]), row["caption"]) for row in json.load(file)]
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise ValueError(f'{path} is not a COCO results file, [{{"image_id": 42, "caption": "a dog"}}, '
                         f'...]: {type(problem).__name__} {problem}')
    results = dict(rows)
    if len(results) < len(rows):
        twice = next(name for name, n in Counter(name for name, _ in rows).items() if n > 1)
        raise ValueError(f"{path}: image_id {twice} has more than one caption")
    for image, caption in rows:
        if not isinstance(caption, str):
            raise ValueError(f"{path}: the caption of image_id {image} is {caption!r}, not text")
    return results


if __name__ == "__main__":
    from fineweb import configure, die, save_atomically

    configure(globals(), positional=("results", "captions"))
    if not (results and captions):
        die("give a results file and a captions file: python cider.py results.json captions_val2017.json (or --help)")
    try:
        listed, references = read_captions(captions)
        ids, judged = [str(image["id"]) for image in listed], read_results(results)
        references = dict(zip(ids, references))
        for wrong, what in ((references.keys() - judged.keys(), f"images of {captions} have no caption"),
                            (judged.keys() - references.keys(), f"images are not in {captions}")):
            if wrong:
                die(f"{results}: {len(wrong)} {what}, such as image_id {', '.join(sorted(wrong)[:5])}")
        candidates = [judged[image] for image in references]
        scores, per_image = evaluate(candidates, list(references.values()))
        if out:
            images = [dict(image_id=image["id"], caption=caption, **{metric: each[i] for metric, each in per_image.items()})
                      for i, (image, caption) in enumerate(zip(listed, candidates))]
            save_atomically(out, lambda file: file.write(json.dumps(dict(scores=scores, images=images)).encode()))
    except (ValueError, OSError) as error:
        die(error)
    print(f"{len(references):,} images, {sum(map(len, references.values())):,} references\n\nmetric     x100     raw")
    for metric, score in scores.items():
        print(f"{metric:8} {100 * score:6.2f}  {score:.4f}")
    ranking = sorted(zip(per_image["CIDEr"], references, candidates), key=lambda row: -row[0])
    for title, rows in ("best", ranking[:show]), ("worst", ranking[::-1][:show]):
        for score, image, caption in rows:
            print(f"{title} CIDEr {score:.3f}, image {image}: {caption!r}, a reference: {references[image][0]!r}")
