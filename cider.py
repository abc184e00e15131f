r"""
The judge: CIDEr, BLEU and ROUGE-L, equal to coco-caption's to the last digit, in numpy, without Java.

    python cider.py results.json captions_val2017.json              # the table of scores
    python cider.py results.json captions_val2017.json show=5       # ... and the five best and worst captions
    python cider.py results.json captions_val2017.json out=s.json   # ... and every image's scores as json
    python cider.py bench=5000                                      # time and memory, beside pycocoevalcap's if installed

results.json is a COCO results file, [{"image_id": 42, "caption": "a dog on a beach"}, ...], the other any COCO captions file.
One core is enough: 5,000 images of five references take 0.3 s, 20 times less than pycocoevalcap, and a third of its memory.
A person who describes COCO's pictures scores a CIDEr of about 0.9, good captioners 1.2 to 1.4; papers print 120 to 140.

CIDEr (Vedantam, Zitnick, Parikh 2015, https://arxiv.org/abs/1411.5726) asks: five people described the picture; does the
candidate say what they agree on, in words that say something? A caption becomes a vector with one entry for each n-gram g
(n words in a row), its tf-idf weight, term frequency times inverse document frequency:

    w(g) = how often the caption says g * ln(N / how many of the N images have g in a reference)

"a" is in the references of every image: ln(N / N) = 0, it counts nothing. "unicycle" is in few: it counts much. The candidate
c is compared with each reference r by the cosine of their vectors; the mean over references and over n = 1..4 is the image's
score, the mean over images the corpus's. What everybody prints is the variant CIDEr-D, which is harder to fool:

    CIDEr-D_n(c, r) = 10 * exp(-(|c| - |r|)^2 / (2 * 6^2)) * sum_g min(w_c(g), w_r(g)) * w_r(g) / (||w_c|| * ||w_r||)

The min clips: "dog dog dog" earns what the reference's one dog is worth. The Gaussian punishes a wrong length. The 10 makes
the scale 0 to 10; tables print it x100. Two surprises follow from idf. An image scored alone gets 0: for N = 1 all logarithms
are 0. And the score of a subset is not the mean of its images' scores within the whole, as N and the frequencies are its own:
compare on equal splits only, or give the frequencies of a corpus with `df=`, as training on CIDEr does.

Letters: N images; S sentences (each image's candidate, then its references); T words in all of them; n the order, 1..4;
G different n-grams; E different (n-gram, sentence) pairs.
"""
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import time
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# settings: `python cider.py name=value` overrides any of them

results = None          # COCO results file to judge
captions = None         # COCO captions file: the references
out = None              # write the scores, overall and of each image, to this json file
show = 0                # print so many of the best and of the worst captions
bench = 0               # instead, measure time and memory on so many made images of five references each

# ----------------------------------------------------------------------------------------------------------------------
# Tokens. Scores can be compared only if all cut words alike: as the Penn Treebank does, in the dialect of the Java program in
# coco-caption (CoreNLP 3.4.1). That is a lexer: of all rules, the longest match wins. Here the order of the rules makes the
# first match the longest. What no rule takes (commas, quotes, emoji) vanishes, as punctuation does anyway. Scans that may come
# to nothing are short, {0,30}: else "a,a,a,..." would take quadratic time.

NOT = "_²³¹¼-¾⁰-₉⅐-↉①-➓㆒-㆕㈠-㊿\U00010000-\U0010ffff"              # in Python's \w, but no letters or digits to Java
L, W, A = rf"[^\W\d{NOT}]", rf"[^\W{NOT}]", "[A-Za-z0-9]"           # a letter; a letter or digit; an ASCII letter or digit
M = "".join(c for c in map(chr, range(0x300, 0xED0)) if unicodedata.category(c) in ("Mn", "Mc"))
M = f"(?:[{M}]|&[aeiouAEIOU](?:acute|grave|uml);)"                  # accents that come apart from their letter
Q, QQ, CLITIC = "['’]", "['’‘‛]", "(?i:[smd]|re|ve|ll)"             # apostrophes; what follows them in it's, they're
DOTTED, DOT = r"[A-Za-z](?:\.[A-Za-z])+", r"(?:\.(?=[,;:、]))?"      # U.S; the period of "dog.," is kept, as of "etc.,"
NAME = f"[dolDOL]{QQ}{L}"                                           # d'Angelo, O'Neill: two more letters at least
COMPOUND = f"{W}+(?:[-_֊‐‑](?:{NAME})?{W}+)*"
PHONE = r"[0-9]{3,4}[- \xa0]?[0-9]{3,5}"
ALONE = rf"(?!\w|-{W}|{Q}{CLITIC})"
ABBREVIATED = """adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig bros calif capt cf cie
    cmdr co col colo comdr conn corp cos cpl ct dak dec dept det drs? elec ens esq est etc ext feb fla fri ft ga gen govs? hon inc
    ind insp intl invt jan jos jr jul jun kans? ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mrs? ms msgr
    mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pptys pres profs? ptes? ptys? pvt rd reps? rev rt sens? sept? seq
    sfc sgt spc sq sr ste? supts? sys tel tenn thu thurs treas tues? univ va vs vt wed wisc? wm wyo"""
NUMBERED = r"(?i:nos?|figs?|art|ca|op|pp|prop)\."                   # abbreviations only before a number: no. 5
CAPITAL = lambda text: "|".join(f"{word[0]}(?i:{word[1:]})" for word in text.split())
STATES = CAPITAL("Ark Az Del Ill La Mass Miss Ore Pa Tex Wash")     # abbreviations only with a capital: ore., la.
OPENERS = CAPITAL(r"""About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More Mr\.
    Ms\. Now Once One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet You""")

WORDS = [                                                           # what begins with a letter or a digit
    r'(?i:https?)://[^\s"<>|()]+[^\s"<>|.!?(){},-]',
    rf'{A}[^\s"<>|()]{{0,30}}@(?:[^\s"<>|().]+\.)*[^\s"<>|().]+',   # me@dog.org
    r'(?:www\.(?:[^\s"<>|.!?(){},]{1,30}\.){1,8}[A-Za-z]{2,4}|(?:[^\s!"$\'(),-_`{|}]{1,30}\.){1,8}(?:com|net|org|edu))'
    rf'(?:/[^\s"<>|()]+[^\s"<>|.!?(){{}},-]|(?![\w-]|[.!?]{L}))',   # dog.org, www.dog.tv/cat
    r"\d{1,2}/\d{1,2}-\d{2,4}|\d{1,4}[- \xa0]\d{1,4}(?:\\?/|⁄)\d{1,4}",                         # 22 3/4: one token, with a space
    rf"(?=[0-9-]{{2,15}}[ \xa0])(?:[0-9]{{2,4}}[- \xa0])?[0-9]{{2,4}}[- \xa0]{PHONE}",          # 555 123 4567: the same
    rf"{A}+(?:-[A-Za-z]+){{0,2}}(?:\\?/{A}+(?:-[A-Za-z]+){{0,2}}){{1,2}}|\d{{1,4}}⁄\d{{1,4}}",  # and/or, black-white/red, 1/2
    rf"(?:{A}{{1,30}}[.,][A-Za-z0-9.,]{{0,30}}(?=-{A})|{A}+(?:-{A}+)*-{DOTTED}\.)(?:-(?:{DOTTED}\.|{A}+))*{DOT}",     # 1,000-foot
    rf"(?:{DOTTED}|(?i:ph|ed)\.[dD])\.(?!{L})",                     # U.S., p.m., Ph.D.
    rf"{L}{W}*(?:[.!?]{L}{W}*)+{DOT}",                              # dog.The: no space, no cut
    rf"{NUMBERED}(?=\s?\d)|(?=[A-Za-z]{{2,7}}\.)(?:(?i:{'|'.join(ABBREVIATED.split())})|{STATES})\.",
    rf"[A-Za-z]\.(?!\s+(?:{OPENERS})\s)",                           # J. Crew; but "vitamin C. The dog" ends a sentence
    rf"(?i:s&ls|s&p-500|c\+\+|c#|cap{Q}n|c{Q}est|(?:pro|anti)-(?!{W}))",
    r"(?i:cont'd\.|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o`clock)",
    rf"[A-Z]+(?:[+&][A-Z]+)+{DOT}|[A-Z]+\$|\d+(?:[.:,٫٬]\d+)+",     # AT&T, US$, 12:30
    rf"(?![a-zA-Z]{QQ}(?i:re|ve|ll)(?!{W})){NAME}{COMPOUND}{DOT}",  # d'oeuvres
    rf"(?i:dunkin|somethin|ol|[ldj]|y(?={Q}{L})){Q}(?!{CLITIC})",   # ol' dog, j'adore, y'all
    rf"[A-HJ-XZn]{QQ}(?!(?i:re|ve|ll)(?!{L})){L}{{2}}{L}*",         # B'Gosh
    rf"{L}{{2}}{L}*(?<=[aeiouyAEIOUY]){QQ}(?!{CLITIC}(?!{L}))[aeiouA-Z]{L}*",                   # ma'am
    r"[nN][`'’‘‛][tT]|[A-Za-z]+(?<![nN])(?=[nN][`'’‘‛][tT])",       # does|n't, can|not, gon|na
    rf"(?i:can(?=not{ALONE})|got(?=ta{ALONE})|(?:gon|wan)(?=na{ALONE})|(?:lem|gim)(?=me{ALONE}))",
    rf"(?:{L}+|(?={M}))(?:{M}+{L}*)+|{COMPOUND}{DOT}"]                                         # dog, snow-covered, 8th, dog_cat: nearly all there is
OTHERS = [
    r"[-x^=~<>']_[-x^=~<>']|\([-x^=~<>'][-_.]?[-x^=~<>']\)",        # ^_^ (-_-)
    r"[<>]?[:;=][-o*']?[()DPdpO\\{@|[\]](?=[^A-Za-z0-9])",          # :) ;-D
    rf"(?i:-[lr][rcs]b-)|\+{{1,2}}(?:[0-9]{{2,4}}[- \xa0])?[0-9]{{2,4}}[- \xa0]{PHONE}|\([0-9]{{2,3}}\)[ \xa0]?{PHONE}",
    rf"(?i:'n'|{Q}n(?=\s|$)|’n’?|{Q}(?:em|till?|cause|[2-9]0s)|'t(?=is|was))|{Q}\d\d(?=\s)|''|[`‘’‚‛“”„‟‹›«»]{{2}}"
    r"|(?i:'(?:[smd](?![a-z])|(?:re|ve|ll)(?=[^a-z]))|’(?:[smd]|re|ve|ll))",                    # 's, 'em, 'n', '80s
    r"""</?[A-Za-z][\w:-]*(?:[^\S\n]+[\w:-]+(?:[^\S\n]*=[^\S\n]*(?:"[^"<>\n]*"|'[^'<>\n]*'))?)*[^\S\n]*/?>"""
    r"|<[!?][A-Za-z-][^<>\n]*>|<<|>>",                              # <br/>
    rf"&(?:[lg]t|#\d+|HT|TL|UR|LR|QC|QL|QR|odq|cdq);|#{L}+|@[A-Za-z_][A-Za-z_0-9]*",
    r"[-+]?\d*(?:[.:,٫٬]\d+)+|[-+]\d+|\*+|(?:\\\*){1,3}|#+|@+|_+|[?!]+|-+|\.{3,5}|[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)",
    r"[$-&(-+/<=>[-^{|}~‚„‟¡-§©¬®°±´¶·¸¿¼½¾×÷;·։־׀׃׆׳״؀-؃؆-،ؔ؛؞؟٪٭۔܀-܍߶-߸।॥฿๏᾽‖‗†-‣‰-›※‾-⁂⁄⁺-⁾₊-₎₠₤€℀-⅏⅓-⅞←-⯿、。〒・"
    r"！-／：-＠［-･￠￡￥￦]|\n"]         # \n is the end of a caption: see tokenize
LEXER = re.compile(f"(?={W}|{M})(?:{'|'.join(WORDS)})|{'|'.join(OTHERS)}")
SOCIAL = re.compile(rf"^\d\d|^\d\\?[/⁄]|<|(?<![\w'’.])(?:[A-Za-z]\.|{NUMBERED})")    # chunks that depend on neighbours

# how the reference writes what it found, and what coco-caption drops
CLEAN = {**dict.fromkeys(map(ord, "\n\r\v\f\x85\u2028\u2029"), " "), 0xAD: None, **dict(zip(range(0x91, 0x95), "‘’“”"))}
ENTITIES = {"&nbsp;": " ", "&apos;": "’", "&amp;": "&", "&quot;": '"', "&mdash;": "—", "&ndash;": "—", "&md;": "—"}
BRACKETS = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "&lt;": "<", "&gt;": ">"}
STRAIGHT = str.maketrans({**dict.fromkeys("‘‛‹", "`"), **dict.fromkeys("’›", "'"), "“": "``", "«": "``", "”": "''", "»": "''"})
WRITTEN = str.maketrans({"(": "-lrb-", ")": "-rrb-", " ": "\xa0", "¢": "cents", "£": "#", **dict.fromkeys("€¤₠\x80", "$"),
                         "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"})
DROPPED = set("'' ' `` ` . ? ! , : ; - -- --- ---- ... .... .....".split())

def clean(text):
    text = text.translate(CLEAN)
    return re.sub(f"(?i:{'|'.join(ENTITIES)})", lambda match: ENTITIES[match[0].lower()], text) if "&" in text else text

@functools.lru_cache(1 << 16)
def spell(token):
    """A token as the reference writes it, "" if it drops it. It drops -LRB- before it lowers the case, hence -lrb- stays."""
    if not token.isascii() and re.fullmatch(rf"[`‘’‚‛“”„‟‹›«»]+|’{CLITIC}|[nN]{QQ}[tT]", token):
        token = token.translate(STRAIGHT)
    token = BRACKETS.get(token, token).translate(WRITTEN).lower()
    return "" if token in DROPPED else token

def lex(text):
    return [token for token in map(spell, LEXER.findall(text)) if token]

@functools.lru_cache(1 << 17)
def lex_chunk(chunk):
    """Tokens of what stands between two spaces. Only a few thousand chunks are different in a whole corpus: remember them."""
    if SOCIAL.search(chunk):
        raise LookupError
    return lex(clean(chunk) + " ")

def tokenize(captions):
    """
    captions (list of str) -> a list of tokens for each, in lower case, without punctuation.
    The reference reads the whole list as one text, a caption a line, and the next line can matter: the period of "letter X."
    goes if "The ..." follows. So give it what it got: all references in the order of the file, and the candidates apart.
    """
    tokens = []
    for i, caption in enumerate(captions):
        try:
            if i + 1 == len(captions):
                raise LookupError                                   # the end of the text is a neighbour too
            tokens.append(list(itertools.chain.from_iterable(map(lex_chunk, caption.split()))))
        except LookupError:
            here = lex("\n".join([clean(caption)] + [clean(text[:30]) for text in captions[i + 1:i + 3]]))
            tokens.append(here[:here.index("\n")] if "\n" in here else here)
    return tokens

def tokenize_all(candidates, references):
    flat = iter(tokenize([ref for refs in references for ref in refs]))
    return tokenize(candidates), [[next(flat) for _ in refs] for refs in references]

# ----------------------------------------------------------------------------------------------------------------------
# From words to numbers. All sentences go into one flat array of word ids: a million small lists would cost seconds.

def index(candidates, references):
    """Token lists -> word ids (T,), sentence lengths (S,), the sentences' images (S,), vocabulary {word: id}."""
    sentences = [sentence for candidate, refs in zip(candidates, references) for sentence in (candidate, *refs)]
    flat = [word for sentence in sentences for word in sentence]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(flat))}
    words = np.fromiter(map(vocabulary.__getitem__, flat), np.int64, len(flat))
    lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
    return words, lengths, np.repeat(np.arange(len(references)), [1 + len(refs) for refs in references]), vocabulary

def split_spaces(words, lengths, vocabulary):
    """A trap: "22 3/4", held together by a no-break space, is one word to the reference's ROUGE, two to its CIDEr and BLEU."""
    parts = [[vocabulary.setdefault(part, len(vocabulary)) for part in word.split()] for word in list(vocabulary)]
    pieces, flat = np.array([len(part) for part in parts], np.int64), np.array([i for part in parts for i in part], np.int64)
    begin, many = (np.cumsum(pieces) - pieces)[words], pieces[words]                # (T,)
    sentence = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many - begin, many)
    return flat[place], np.bincount(sentence, many, len(lengths)).astype(np.int64)

def differs(*columns):
    """True where a row of the columns, all (E,), differs from the row before."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], 0)
    return new

def ngrams(words, lengths, everything=False):
    """
    For n = 1..4: gram, sentence, tf (E,), single (S,), first (G,). Row e: n-gram gram[e] is tf[e] times in sentence[e]; rows in
    the order of n-grams, then sentences. words[first[g]:][:n] spells n-gram g. What occurs once in all T words matches nothing,
    nor does what begins or ends with it: unless `everything`, such n-grams are only counted, single[s] of them. Half the work.
    """
    T, V, S = len(words), int(words.max(initial=0)) + 1, len(lengths)
    sentence = np.repeat(np.arange(S, dtype=np.int32), lengths)     # (T,)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(T)    # (T,) words from here to the end of the sentence
    bits, start, key = T.bit_length(), np.arange(T), words
    for n in 1, 2, 3, 4:
        if n > 1:                                                   # an n-gram is the (n-1)-gram here and one word more
            start = start[left[start] >= n]
            start = np.sort(start[at[np.minimum(start + 1, T - 1)] >= 0])
            key = at[start].astype(np.int64) * V + words[start + n - 1]
        assert key.max(initial=0) < 1 << (63 - bits), f"{T} words are too many at once: score them in parts, with df="
        packed = np.sort(key << bits | start)                       # n-gram above, place below: far faster than argsort
        start = packed & ((1 << bits) - 1)
        new = differs(packed >> bits)
        if not everything:
            often = ~(new & np.append(new[1:], True))
            start, new = start[often], new[often]
        gram, said = np.cumsum(new, dtype=np.int32) - 1, sentence[start]
        at = np.full(T, -1, np.int32)                               # (T,) which n-gram begins here
        at[start] = gram
        row = np.flatnonzero(differs(gram, said))
        single = np.maximum(lengths - n + 1, 0) - np.bincount(said, minlength=S)
        yield gram[row], said[row], np.diff(row, append=len(gram)), single, start[new]

def spellings(words, first, n, vocabulary):
    """The n-grams as tuples of words."""
    return list(map(tuple, np.array(list(vocabulary), object)[words[first[:, None] + np.arange(n)]].tolist()))

METRICS = "CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"

def document_frequencies(references):
    """
    Tokens of a corpus, references[i] a list of token lists for image i -> {("a", "dog"): number of images that have it}, with N
    under (). N-grams of a single image are left out: what is not in it counts as 1.
    """
    words, lengths, image, vocabulary = index([()] * len(references), references)
    words, lengths = split_spaces(words, lengths, vocabulary)
    df = {(): len(references)}
    for n, (gram, sentence, _, _, first) in enumerate(ngrams(words, lengths), 1):
        images = np.bincount(gram[differs(gram, image[sentence])], minlength=len(first))
        shared = images > 1
        df.update(zip(spellings(words, first[shared], n, vocabulary), images[shared].tolist()))
    return df

def cider_and_matches(words, lengths, image, vocabulary, df=None):
    """
    CIDEr-D of each image (N,), as in the docstring above (Vedantam et al. 2015, eq. 1-3 and section 6), and from the same tables
    what BLEU wants, matches (4, N): how many n-grams of the candidate are in its references, each at most as often as in
    the one that says it most (Papineni et al. 2002, section 2.1).
    """
    is_candidate = differs(image)                                   # (S,) the first sentence of each image
    candidate, S, N = np.flatnonzero(is_candidate), len(lengths), int(image[-1]) + 1
    corpus = df[()] if df else N
    similarity, matches = np.zeros(S), np.zeros((4, N))
    for n, (gram, sentence, tf, single, first) in enumerate(ngrams(words, lengths, everything=bool(df)), 1):
        if df:
            images = np.array([df.get(g, 0) for g in spellings(words, first, n, vocabulary)])
        else:                                                       # candidates don't count
            r = ~is_candidate[sentence]
            images = np.bincount(gram[r][differs(gram[r], image[sentence[r]])], minlength=len(first))
        idf = np.log(corpus / np.maximum(1, images))                # (G,) exactly 0 for what every image has
        weight = tf * idf[gram]                                     # (E,)
        norm = np.sqrt(np.bincount(sentence, weight ** 2, S) + single * np.log(corpus) ** 2)        # (S,)
        new = differs(gram, image[sentence])                        # rows of one n-gram and image: candidate first, if it has it
        own = np.diff(np.flatnonzero(new), append=len(new))
        kept = np.repeat(is_candidate[sentence[new]], own)
        sentence, tf, weight, new = sentence[kept], tf[kept], weight[kept], new[kept]
        begin = np.flatnonzero(new)
        clipped = np.minimum(np.repeat(weight[begin], np.diff(begin, append=len(new))), weight) * weight
        length = norm * norm[candidate][image]
        similarity += np.divide(np.bincount(sentence, clipped, S), length, out=np.zeros(S), where=length > 0)
        if len(begin):
            most = np.maximum.reduceat(np.where(new, 0, tf), begin)
            matches[n - 1] = np.bincount(image[sentence[begin]], np.minimum(tf[begin], most), N)
    delta = np.maximum(lengths - 1, 0) - np.maximum(lengths[candidate] - 1, 0)[image]       # the reference counts bigrams
    similarity *= np.exp(-delta ** 2 / (2 * 6.0 ** 2)) * ~is_candidate
    return 10 * np.bincount(image, similarity, N) / 4 / (np.bincount(image) - 1), matches

def cider(candidates, references, df=None):
    """CIDEr-D of each image (N,), from tokens: as a reward for batches, with df=document_frequencies(all references)."""
    words, lengths, image, vocabulary = index(candidates, references)
    return cider_and_matches(*split_spaces(words, lengths, vocabulary), image, vocabulary, df)[0]

def bleu(matches, tries, length, closest):
    """
    BLEU-1..4 (Papineni et al. 2002, section 2.3): the geometric mean of the precisions matches / tries, both (4, ...), times
    exp(1 - r/c) if the candidate's length c is below that of the closest reference, r. Of each image, or of sums over all.
    The tiny numbers are the reference's, and show: where no 4-gram matches, BLEU-4 is about 1e-4, not 0.
    """
    ratio = (length + 1e-15) / (closest + 1e-9)
    mean = [bleu ** (1 / n) for n, bleu in enumerate(np.cumprod((matches + 1e-15) / (tries + 1e-9), 0), 1)]
    return np.array(mean) * np.exp(np.minimum(0, 1 - 1 / ratio))

def rouge_l(words, lengths, image, beta=1.2):
    """
    ROUGE-L of each image (N,) (Lin 2004, eq. 2-4): F of precision lcs / |c| and recall lcs / |r|, each the best over the
    references; lcs is the length of the longest common subsequence, by the usual table, for 4,096 pairs at a time.
    """
    is_candidate = differs(image)
    candidate = np.flatnonzero(is_candidate)
    begin, empty, lcs = np.cumsum(lengths) - lengths, lengths == 0, np.zeros(len(lengths))
    words, lengths = np.append(words, -1), np.maximum(lengths, 1)   # a trap: "".split(" ") is one word, equal to itself

    def columns(s, pad):                                            # sentences (P,) -> word ids (longest, P)
        place = np.arange(lengths[s].max())[:, None]
        ids = words[np.where(empty[s], -1, np.minimum(begin[s] + place, len(words) - 1))]
        return np.where(place < lengths[s], ids, pad)

    pairs = np.flatnonzero(~is_candidate)
    pairs = pairs[np.lexsort((lengths[pairs], lengths[candidate][image[pairs]]))]   # like lengths together: little padding
    for i in range(0, len(pairs), 4096):
        pair = pairs[i:i + 4096]
        reference = columns(pair, -2)
        table = np.zeros((len(reference) + 1, len(pair)), np.int32)                 # one row of each pair's table
        for word in columns(candidate[image[pair]], -3):
            np.maximum(table[1:], table[:-1] + (reference == word), out=table[1:])
            np.maximum.accumulate(table, axis=0, out=table)
        lcs[pair] = table[-1]
    precision = np.maximum.reduceat(lcs / lengths[candidate][image], candidate)
    recall = np.maximum.reduceat(lcs / lengths, candidate)
    return (1 + beta ** 2) * precision * recall / np.maximum(recall + beta ** 2 * precision, 1e-9)

def evaluate(candidates, references, df=None, tokenized=False):
    """
    candidates, N strings, and references, N lists of strings -> scores {metric: float}, per_image {metric: (N,)}; CIDEr runs
    from 0 to 10. df: document frequencies of another corpus. tokenized: each string is a list of tokens already.
    """
    kind, what = ((list, tuple), "a list of tokens") if tokenized else (str, "a string")
    if len(candidates) != len(references) or len(candidates) == 0:
        raise ValueError(f"{len(candidates)} candidates, but references of {len(references)} images")
    for i, (candidate, refs) in enumerate(zip(candidates, references)):
        if not isinstance(refs, (list, tuple)) or len(refs) == 0:
            raise ValueError(f"image {i} has no references: it needs a list of at least one, not {refs!r:.60}")
        for name, sentence in ("candidate", candidate), *(("a reference", ref) for ref in refs):
            if not isinstance(sentence, kind):
                raise ValueError(f"{name} of image {i} is not {what}: {sentence!r:.60}")
    if not tokenized:
        candidates, references = tokenize_all(candidates, references)
    if not any(map(any, references)):
        raise ValueError(f"all references are empty, those of image 0 to those of image {len(references) - 1}")
    words, lengths, image, vocabulary = index(candidates, references)
    rouge = rouge_l(words, lengths, image)
    words, lengths = split_spaces(words, lengths, vocabulary)
    consensus, matches = cider_and_matches(words, lengths, image, vocabulary, df)

    candidate = np.flatnonzero(differs(image))
    length = lengths[candidate]
    tries = np.maximum(length - np.arange(4)[:, None], 0)           # (4, N) n-grams of the candidates
    off = np.abs(lengths - length[image]) << 32 | lengths           # the closest reference: of two as close, the shorter
    off[candidate] = np.iinfo(np.int64).max
    closest = np.minimum.reduceat(off, candidate) & 0xFFFFFFFF
    corpus = bleu(matches.sum(1), tries.sum(1), length.sum(), closest.sum())        # not the mean of the images' scores
    scores = consensus.mean(), *corpus, rouge.mean()
    return dict(zip(METRICS, map(float, scores))), dict(zip(METRICS, (consensus, *bleu(matches, tries, length, closest), rouge)))

# ----------------------------------------------------------------------------------------------------------------------
# the command line

def read_coco(results, captions):
    """Two COCO files -> image ids, candidates, references; in the captions file's order, which is coco-caption's."""

    def load(path, key, form):
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            pairs = [(row["image_id"], row["caption"]) for row in (content[key] if key else content)]
            if all(isinstance(caption, str) for _, caption in pairs):
                return content, pairs, Counter(image for image, _ in pairs)
        except (OSError, ValueError) as error:
            raise ValueError(f"can't read {path}: {getattr(error, 'strerror', None) or error}")
        except (LookupError, TypeError):
            pass
        raise ValueError(f"{path} is not a COCO {form}")

    example = '[{"image_id": 42, "caption": "a dog"}, ...]'
    content, pairs, known = load(captions, "annotations", f'captions file, {{"annotations": {example}}}')
    _, judged, times = load(results, None, f"results file, {example}")
    for ids, what in ((known.keys() - times.keys(), f"images of {captions} have no caption"),
                      (times.keys() - known.keys(), f"images are not in {captions}"),
                      ({image for image in times if times[image] > 1}, "images have more than one caption")):
        if ids:
            raise ValueError(f"{results}: {len(ids)} {what}, such as image_id {', '.join(map(str, sorted(ids, key=str)[:5]))}")
    references = {image["id"]: [] for image in content.get("images", []) if image["id"] in known}
    for image, caption in pairs:
        references.setdefault(image, []).append(caption)
    return list(references), list(map(dict(judged).get, references)), list(references.values())

def made(images):
    """Captions nobody wrote: 8 to 14 words, as frequent as in English (Zipf)."""
    rng = np.random.default_rng(0)
    words = [a + b + c + d for a in "bdfghklmnprst" for b in "aeiou" for c in "bdglmnprst" for d in ("ck", "er", "s")]
    words = rng.permutation(words).tolist()
    words[50:53] = "man's", "t-shirt,", "2"
    often, lengths = 1 / (4 + np.arange(len(words))), rng.integers(8, 15, 6 * images)
    said = iter(rng.choice(words, lengths.sum(), p=often / often.sum()).tolist())
    captions = [" ".join(itertools.islice(said, n)).capitalize() + "." for n in lengths.tolist()]
    return captions[:images], [captions[i:i + 5] for i in range(images, 6 * images, 5)]

def race(ours, images):
    """Seconds from captions to tokens and from tokens to scores (medians of three), peak MB. In a process of its own."""
    import resource
    candidates, references = made(images)
    if not ours:
        from pycocoevalcap.eval import Bleu, Cider, PTBTokenizer, Rouge
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)                # it prints, and so does Java
        os.dup2(1, 2)
        candidates, references = [{i: [{"caption": caption} for caption in row] for i, row in enumerate(rows)}
                                  for rows in ([[candidate] for candidate in candidates], references)]
    times = []
    for _ in range(3):
        lex_chunk.cache_clear()
        start = time.perf_counter()
        if ours:
            tokens = tokenize_all(candidates, references)
            middle = time.perf_counter()
            evaluate(*tokens, tokenized=True)
        else:
            tokens = [PTBTokenizer().tokenize(rows) for rows in (candidates, references)]
            middle = time.perf_counter()
            for metric in Bleu(4), Cider(), Rouge():
                metric.compute_score(tokens[1], tokens[0])
        times.append((middle - start, time.perf_counter() - middle))
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return np.array([*np.median(times, 0), peak / 2 ** (20 if sys.platform == "darwin" else 10)])

if __name__ == "__main__":
    from fineweb import configure, die
    configure(globals(), positional=("results", "captions"))
    if bench:
        found = {}
        for name in ("cider.py", "pycocoevalcap")[:1 + bool(importlib.util.find_spec("pycocoevalcap") and shutil.which("java"))]:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found[name] = t, s, mb = process.submit(race, name == "cider.py", bench).result()
            print(f"{name:13} {t + s:7.2f} s = {t:.2f} s to tokens + {s:.2f} s to scores, {mb:,.0f} MB", flush=True)
        if len(found) == 2:
            (t, s, mb), (theirs, their_s, their_mb) = found.values()
            print(f"{bench:,} images: {(theirs + their_s) / (t + s):.1f}x as fast, from tokens {their_s / s:.1f}x, "
                  f"with {mb / their_mb:.2f} of the memory")
        else:
            print("for the comparison: pip install pycocoevalcap, and Java")
        sys.exit()

    if not (results and captions):
        die("give a results file and a captions file: python cider.py results.json captions_val2017.json (or --help)")
    try:
        ids, candidates, references = read_coco(results, captions)
        scores, per_image = evaluate(candidates, references)
        if out:
            images = [{"image_id": image, "caption": caption, **{metric: float(per_image[metric][i]) for metric in METRICS}}
                      for i, (image, caption) in enumerate(zip(ids, candidates))]
            with open(f"{out}.tmp", "w", encoding="utf-8") as file:
                json.dump({"scores": scores, "images": images}, file)
            os.replace(f"{out}.tmp", out)                           # all or nothing
    except ValueError as error:
        die(error)
    except OSError as error:
        die(f"can't write {out}: {error.strerror}")
    print(f"{len(ids):,} images, {sum(map(len, references)):,} references\n\nmetric     x100     raw")
    for metric, score in scores.items():
        print(f"{metric:8} {100 * score:6.2f}  {score:.4f}")
    ranking = np.argsort(-per_image["CIDEr"], kind="stable").tolist()
    for title, chosen in ("best", ranking[:show]), ("worst", ranking[::-1][:show]):
        for i in chosen:
            print(f"{title} CIDEr {per_image['CIDEr'][i]:.3f}, image {ids[i]}: {candidates[i]!r}, a reference: {references[i][0]!r}")
