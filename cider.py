r"""
The judge: CIDEr, BLEU and ROUGE-L, equal to coco-caption's, in numpy, without Java.

    python cider.py results.json captions_val2017.json              # the table of scores
    python cider.py results.json captions_val2017.json show=5       # ... and the five best and worst captions
    python cider.py results.json captions_val2017.json out=s.json   # ... and every image's scores as json
    python cider.py bench=5000                                      # 0.4 s on a core of an AMD EPYC; pycocoevalcap: 4.7

results.json is a COCO results file, [{"image_id": 42, "caption": "a dog"}, ...], the other any COCO captions file.

CIDEr (Vedantam, Zitnick, Parikh 2015, https://arxiv.org/abs/1411.5726) asks: five people described the picture; does
the candidate say what they agree on, in words that say something? A caption becomes a vector with one entry for each
n-gram g (n words in a row), its tf-idf weight, term frequency times inverse document frequency:

    w(g) = how often the caption says g * ln(N / how many of the N images have g in a reference)

"a" is in the references of every image: ln(N / N) = 0, it counts nothing. "unicycle" is in few: it counts much. The
candidate c meets each reference r by the cosine of their vectors; the mean over references and over n = 1..4 is the
image's score, the mean over images the corpus's. What papers print is the variant CIDEr-D, which is harder to fool:

    CIDEr-D_n(c, r) = 10 * exp(-(|c| - |r|)^2 / (2 * 6^2)) * sum_g min(w_c(g), w_r(g)) * w_r(g) / (||w_c|| * ||w_r||)

The min clips: "dog dog dog" earns what the reference's one dog is worth. The Gaussian punishes a wrong length. The 10
makes the scale 0 to 10; tables print it x100. Two surprises follow from idf. An image scored alone gets 0: for N = 1
all logarithms are 0. And a subset's score is not the mean of its images' scores within the whole, as N and the
frequencies are its own: compare on equal splits, or give the frequencies of a corpus, `df=`, as training on CIDEr does.

Letters: N images; S sentences (each image's candidate, then its references); T words in all of them; n the order, 1..4;
G different n-grams; E different (n-gram, sentence) pairs; P (candidate, reference) pairs.
"""
import functools
import itertools
import json
import re
import sys
import unicodedata
from collections import Counter

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python cider.py name=value` overrides any of them

results = None   # COCO results file to judge
captions = None  # COCO captions file: the references
out = None       # write the scores, overall and of each image, to this json file
show = 0         # print so many of the best and of the worst captions
bench = 0        # instead, measure the time on so many made-up images of five references each

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
    rf"(?i:can(?=not{ALONE})|got(?=ta{ALONE})|(?:gon|wan)(?=na{ALONE})|(?:lem|gim)(?=me{ALONE}))",  # can|not, gon|na
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


def lex(*lines):
    text = "\n".join(line.translate(CLEAN) for line in lines)
    text = re.sub(f"(?i:{'|'.join(ENTITIES)})", lambda match: ENTITIES[match[0].lower()], text)
    return [token for token in map(spell, LEXER.findall(text)) if token]


@functools.lru_cache(1 << 17)
def lex_chunk(chunk):
    """Tokens of what stands between two spaces, None if neighbours matter. A whole corpus has few different chunks."""
    return None if SOCIAL.search(chunk) else lex(chunk + " ")


def tokenize(captions):
    """
    captions (list of str) -> a list of tokens for each, in lower case, without punctuation.
    The reference reads the list as one text, a caption a line, and the next line can matter: the period of "letter X."
    goes if "The ..." follows. So give it what it got: all references in the file's order, and the candidates apart.
    """
    tokens = []
    for i, caption in enumerate(captions):
        chunks = list(map(lex_chunk, caption.split())) if i + 1 < len(captions) else [None]  # the end matters too
        if None in chunks:
            chunks = [itertools.takewhile("\n".__ne__, lex(caption, *(text[:30] for text in captions[i + 1:i + 3])))]
        tokens.append(list(itertools.chain.from_iterable(chunks)))
    return tokens


def tokenize_all(candidates, references):
    flat = iter(tokenize([ref for refs in references for ref in refs]))
    return tokenize(candidates), [[next(flat) for _ in refs] for refs in references]


# ----------------------------------------------------------------------------------------------------------------------
# From words to numbers. All sentences go into one flat array of word ids: a million small lists would cost seconds.


def index(candidates, references):
    """
    Token lists -> vocabulary {word: id}, the sentences' images (S,), and twice word ids (T,) and sentence lengths (S,):
    for ROUGE, to which a caption without words is one word, "", that even matches another's; for CIDEr and BLEU, to
    which "" is none, and "22 3/4", held together by a no-break space, two.
    """
    sentences = [said or [""] for candidate, refs in zip(candidates, references) for said in (candidate, *refs)]
    image = np.repeat(np.arange(len(references)), [1 + len(refs) for refs in references])
    flat = list(itertools.chain.from_iterable(sentences))
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(flat))}
    words = np.fromiter(map(vocabulary.__getitem__, flat), np.int64, len(flat))
    lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
    parts = [[vocabulary.setdefault(part, len(vocabulary)) for part in word.split()] for word in list(vocabulary)]
    pieces, flat = np.array(list(map(len, parts))), np.array(list(itertools.chain.from_iterable(parts)), np.int64)
    begin, many = (np.cumsum(pieces) - pieces)[words], pieces[words]  # (T,)
    place = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many - begin, many)
    return vocabulary, image, (words, lengths), (flat[place], np.add.reduceat(many, np.cumsum(lengths) - lengths))


def differs(*columns):
    """True where a row of the columns, numbers from 0 up, differs from the row before."""
    return np.any([np.diff(column, prepend=-1) for column in columns], 0)


def ngrams(words, lengths):
    """
    For n = 1..4: gram, sentence, tf (E,), first (G,). Row e: n-gram gram[e] is tf[e] times in sentence[e]; rows in the
    order of n-grams, then sentences. words[first[g]:][:n] spells n-gram g.
    """
    T, V = len(words), int(words.max(initial=0)) + 1
    sentence = np.repeat(np.arange(len(lengths)), lengths)  # (T,)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(T)  # (T,) words from here to the end of the sentence
    at, bits = np.zeros(T, np.int64), T.bit_length()  # (T,) which (n-1)-gram begins here
    for n in 1, 2, 3, 4:
        start = np.flatnonzero(left >= n)
        key = at[start] * V + words[start + n - 1]  # an n-gram is the (n-1)-gram here and one word more
        assert key.max(initial=0) < 1 << (63 - bits), f"{T} words are too many at once: score them in parts, with df="
        packed = np.sort(key << bits | start)  # n-gram above, place below: far faster than argsort
        start = packed & ((1 << bits) - 1)
        new = differs(packed >> bits)
        at[start] = gram = np.cumsum(new) - 1
        row = np.flatnonzero(differs(gram, sentence[start]))
        yield gram[row], sentence[start[row]], np.diff(row, append=len(gram)), start[new]


def document_frequencies(references):
    """
    Tokens of a corpus, a list of token lists for each image -> {("a", "dog"): number of images that have it}, with N
    under (). N-grams of a single image are left out: what is not in it counts as 1.
    """
    df = Counter()
    for refs in references:
        refs = [" ".join(ref).split() for ref in refs]  # as index does
        df.update({gram for ref in refs for n in range(4) for gram in zip(*(ref[i:] for i in range(n + 1)))})
    return {(): len(references), **{gram: images for gram, images in df.items() if images > 1}}


def cider_and_matches(words, lengths, image, vocabulary, df=None):
    """
    CIDEr-D of each image (N,) (eq. 1-3 and section 6 of the paper), and from the same tables what BLEU wants, matches
    (4, N): n-grams of the candidate in its references, each at most as often as in the one that says it most.
    """
    is_candidate = differs(image)  # (S,) the first sentence of each image
    candidate, S, N = np.flatnonzero(is_candidate), len(lengths), int(image[-1]) + 1
    similarity, matches, spelling = np.zeros(S), np.zeros((4, N)), np.array(list(vocabulary), object)
    for n, (gram, sentence, tf, first) in enumerate(ngrams(words, lengths), 1):
        if df:
            images = np.array([df.get(tuple(g), 0) for g in spelling[words[first[:, None] + np.arange(n)]].tolist()])
        else:
            r = ~is_candidate[sentence]  # candidates don't count
            images = np.bincount(gram[r][differs(gram[r], image[sentence[r]])], minlength=len(first))
        idf = np.log((df[()] if df else N) / np.maximum(1, images))  # (G,) exactly 0 for what every image has
        weight = tf * idf[gram]  # (E,)
        norm = np.sqrt(np.bincount(sentence, weight ** 2, S))  # (S,)
        new = differs(gram, image[sentence])
        head = np.flatnonzero(new)[np.cumsum(new) - 1]  # (E,) the first row of this n-gram and image
        both = np.flatnonzero(is_candidate[sentence[head]] & ~new)  # references' rows, if the candidate has it
        head = head[both]
        clipped = np.bincount(sentence[both], np.minimum(weight[head], weight[both]) * weight[both], S)
        length = norm * norm[candidate][image]
        similarity += np.divide(clipped, length, out=np.zeros(S), where=length > 0)
        once = np.flatnonzero(differs(head))
        most = np.maximum.reduceat(tf[both], once)
        matches[n - 1] = np.bincount(image[sentence[head[once]]], np.minimum(tf[head[once]], most), N)
    delta = np.maximum(lengths - 1, 0) - np.maximum(lengths[candidate] - 1, 0)[image]  # the reference counts bigrams
    similarity *= np.exp(-delta ** 2 / (2 * 6.0 ** 2))
    return 10 * np.bincount(image, similarity, N) / 4 / (np.bincount(image) - 1), matches


def cider(candidates, references, df=None):
    """CIDEr-D of each image (N,), from tokens: a reward for batches, with df=document_frequencies(all references)."""
    vocabulary, image, _, split = index(candidates, references)
    return cider_and_matches(*split, image, vocabulary, df)[0]


def bleu(matches, tries, length, closest):
    """
    BLEU-1..4 of images or of sums (Papineni et al. 2002, section 2.3): the geometric mean of the precisions, matches /
    tries, times exp(1 - r/c) if the candidate's length c is below that of the closest reference, r. The tiny numbers
    are the reference's, and show: where no 4-gram matches, BLEU-4 is about 1e-4, not 0.
    """
    ratio = (length + 1e-15) / (closest + 1e-9)
    mean = [bleu ** (1 / n) for n, bleu in enumerate(np.cumprod((matches + 1e-15) / (tries + 1e-9), 0), 1)]
    return np.array(mean) * np.exp(np.minimum(0, 1 - 1 / ratio))


def rouge_l(words, lengths, image, beta=1.2):
    """
    ROUGE-L of each image (N,) (Lin 2004, eq. 2-4): F of precision lcs / |c| and recall lcs / |r|, each the best of the
    references; lcs, the length of the longest common subsequence, by the usual table, for 4,096 pairs at a time.
    """
    candidate, begin, lcs = np.flatnonzero(differs(image)), np.cumsum(lengths) - lengths, np.zeros(len(lengths))

    def columns(s, pad):  # sentences (P,) -> word ids (longest, P)
        place = np.arange(lengths[s].max())[:, None]
        return np.where(place < lengths[s], words[np.minimum(begin[s] + place, len(words) - 1)], pad)

    pairs = np.flatnonzero(~differs(image))
    pairs = pairs[np.lexsort((lengths[pairs], lengths[candidate][image[pairs]]))]  # like lengths together: less padding
    for pair in np.split(pairs, range(4096, len(pairs), 4096)):
        reference = columns(pair, -1)
        table = np.zeros((len(reference) + 1, len(pair)), np.int32)  # one row of each pair's table
        for word in columns(candidate[image[pair]], -2):
            np.maximum(table[1:], table[:-1] + (reference == word), out=table[1:])
            np.maximum.accumulate(table, axis=0, out=table)
        lcs[pair] = table[-1]
    precision = np.maximum.reduceat(lcs / lengths[candidate][image], candidate)
    recall = np.maximum.reduceat(lcs / lengths, candidate)
    return (1 + beta ** 2) * precision * recall / np.maximum(recall + beta ** 2 * precision, 1e-9)


def evaluate(candidates, references, df=None, tokenized=False):
    """
    candidates, N strings, and references, N lists of strings -> scores {metric: float}, per_image {metric: (N,)}; CIDEr
    runs from 0 to 10. df: document frequencies of another corpus. tokenized: each string is a list of tokens already.
    """
    kind, what = ((list, tuple), "a list of tokens") if tokenized else (str, "a string")
    if not 0 < len(candidates) == len(references):
        raise ValueError(f"{len(candidates)} candidates, but references of {len(references)} images")
    for i, (candidate, refs) in enumerate(zip(candidates, references)):
        if not (refs and isinstance(refs, (list, tuple)) and all(isinstance(s, kind) for s in (candidate, *refs))):
            raise ValueError(f"image {i} is not {what} and a list of at least one: {candidate!r:.40}, {refs!r:.60}")
    if not tokenized:
        candidates, references = tokenize_all(candidates, references)
    vocabulary, image, whole, (words, lengths) = index(candidates, references)
    rouge = rouge_l(*whole, image)
    consensus, matches = cider_and_matches(words, lengths, image, vocabulary, df)
    candidate = np.flatnonzero(differs(image))
    length = lengths[candidate]
    if length.sum() == lengths.sum():
        raise ValueError("all references are empty")
    tries = np.maximum(length - np.arange(4)[:, None], 0)  # (4, N) n-grams of the candidates
    off = np.where(differs(image), np.inf, np.abs(lengths - length[image]) + lengths / 2**32)
    closest = np.minimum.reduceat(off, candidate) % 1 * 2**32  # (N,) of the closest reference; the shorter of two
    corpus = bleu(matches.sum(1), tries.sum(1), length.sum(), closest.sum())  # not the mean of the images' scores
    names = "CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"
    per_image = dict(zip(names, (consensus, *bleu(matches, tries, length, closest), rouge)))
    return dict(zip(names, map(float, (consensus.mean(), *corpus, rouge.mean())))), per_image


# ----------------------------------------------------------------------------------------------------------------------
# the command line


def read_coco(path, key=None):
    """A COCO file -> {image id: its captions}, in the order of the file's images, which is coco-caption's."""
    try:
        content = json.load(open(path, encoding="utf-8"))
        said = {image["id"]: [] for image in content.get("images", [])} if key else {}
        for row in content[key] if key else content:
            said.setdefault(row["image_id"], []).append(row["caption"] + "")  # + "": a TypeError unless it is a string
        return {image: captions for image, captions in said.items() if captions}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a COCO {'captions' if key else 'results'} file (--help tells what that is)")


if __name__ == "__main__":
    from fineweb import configure, die, save_atomically

    configure(globals(), positional=("results", "captions"))
    if bench > 0:
        import gc, importlib.util, shutil, timeit
        rng, fresh = np.random.default_rng(0), lambda: (lex_chunk.cache_clear(), spell.cache_clear(), gc.enable())
        seconds = lambda work: np.median(timeit.repeat(work, fresh, number=1, repeat=3))
        ranks = np.exp(rng.uniform(0, 9, (6 * bench, 14))).astype(int).tolist()  # as frequent as English words: Zipf
        made = [" ".join(f"word{rank}" for rank in row[:rng.integers(8, 15)]) for row in ranks]
        candidates, references = made[:bench], [made[i:i + 5] for i in range(bench, 6 * bench, 5)]
        tokens = tokenize_all(candidates, references)
        t, s = seconds(lambda: tokenize_all(candidates, references)), seconds(lambda: evaluate(*tokens, tokenized=True))
        print(f"{bench:,} images: {t + s:.2f} s, {t:.2f} to tokens and {s:.2f} to scores", flush=True)
        if importlib.util.find_spec("pycocoevalcap"):
            from pycocoevalcap.eval import Bleu, Cider, PTBTokenizer, Rouge
            sides = [{i: list(said) for i, said in enumerate(side)} for side in (references, zip(candidates))]
            rows = [{i: [{"caption": text} for text in said] for i, said in side.items()} for side in sides]
            java = seconds(lambda: [PTBTokenizer().tokenize(row) for row in rows]) if shutil.which("java") else np.nan
            theirs = seconds(lambda: (Bleu(4).compute_score(*sides, verbose=0), Cider().compute_score(*sides),
                                      Rouge().compute_score(*sides)))
            print(f"pycocoevalcap: {java + theirs:.2f} s, {java:.2f} to tokens and {theirs:.2f} to scores: "
                  f"{(java + theirs) / (t + s):.1f} times as long, {theirs / s:.1f} times from tokens")
        sys.exit()

    if not (results and captions):
        die("give a results file and a captions file: python cider.py results.json captions_val2017.json (or --help)")
    try:
        references, judged = read_coco(captions, "annotations"), read_coco(results)
        for ids, what in ((references.keys() - judged.keys(), f"images of {captions} have no caption"),
                          (judged.keys() - references.keys(), f"images are not in {captions}"),
                          ({image for image in judged if len(judged[image]) > 1}, "images have more than one caption")):
            if ids:
                die(f"{results}: {len(ids)} {what}, such as image_id {', '.join(map(str, sorted(ids, key=str)[:5]))}")
        candidates = [judged[image][0] for image in references]
        scores, per_image = evaluate(candidates, list(references.values()))
        if out:
            images = [dict(image_id=image, caption=caption, **{metric: each[i] for metric, each in per_image.items()})
                      for i, (image, caption) in enumerate(zip(references, candidates))]
            save_atomically(out, lambda file: file.write(json.dumps(dict(scores=scores, images=images)).encode()))
    except (ValueError, OSError, AssertionError) as error:
        die(error)
    print(f"{len(references):,} images, {sum(map(len, references.values())):,} references\n\nmetric     x100     raw")
    for metric, score in scores.items():
        print(f"{metric:8} {100 * score:6.2f}  {score:.4f}")
    ranking = sorted(zip(per_image["CIDEr"], references, candidates), key=lambda row: -row[0])
    for score, image, caption in ranking[:show] + ranking[::-1][:show]:
        print(f"CIDEr {score:.3f}, image {image}: {caption!r}, a reference: {references[image][0]!r}")
