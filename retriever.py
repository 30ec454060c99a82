# SPDX-License-Identifier: MIT
"""What is searched and asked: corpus, questions, BM25, servers. Then: the built-in agent and its lessons.

    >>> engine = BM25(load_corpus("tiny_corpus.jsonl"))
    >>> engine.search(["capital Paris"], k=1)[0][0]["contents"]
    '"Paris"\\nParis is the capital of France.'
"""
import argparse, copy, gzip, http.client, json, math, os, random, re, string, sys, time, urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from datasets import load_dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

def check(ok, message):
    if not ok:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

@contextmanager
def supplied(what, errors=Exception):
    """What a user supplied is used in this block: an error there ends the program with one sentence."""
    try:
        yield
    except errors as error:
        check(False, f"{what}: {type(error).__name__}: {' '.join(str(error).split())}")

def clean(text, forbidden):
    """Foreign text without lone surrogates, or a match of the regex `forbidden`: "</a>" -> "< /a>"."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return forbidden.sub(lambda match: match[0][:1] + " " + match[0][1:], text)

# -------------------------------------------------------------------------------------- corpus and questions
def read_lines(path):
    """Yields (number, value) of each line of a jsonl file, .gz or not. (load_dataset changes dates in it.)"""
    with supplied(path), (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with supplied(f"{path}, line {number}"):
                yield number, json.loads(line)

def load_corpus(path):
    """Passages from jsonl[.gz]: in Search-R1's format, objects with a string `contents`, '"Title"\\ntext'."""
    rows = list(read_lines(path))
    check(rows, f"{path}: the corpus is empty")
    for number, passage in rows:
        good = isinstance(passage, dict) and isinstance(passage.get("contents"), str)
        check(good, f"{path}, line {number}: a passage needs a string field 'contents'")
    return [passage for _, passage in rows]

def load_questions(sources, part):
    """Questions of one set, or of several with commas between: a file (jsonl[.gz], parquet), a corpus (its
    questions of split `part`) or NAME on the hub, there perhaps with :CONFIG or :CONFIG:SPLIT, such as
    me/bench:nq:test[:1000]. Returns dicts with "question", "golden_answers" and perhaps "set", "prompt"..."""
    questions, parts = {}, [sources] if os.path.exists(sources) else sources.split(",")
    for source in parts:
        name, config, split = (source.split(":", 2) + ["", ""])[:3]
        if os.path.exists(source):  # such a path may hold commas and colons: "my, repo/x", "C:\\x"
            name, config, split = source, "", ""
        title = config or os.path.basename(name).partition(".")[0]
        check(title not in questions, f"{sources}: two sets have the name {title}")
        for row, where in read_rows(name, config, split or part, part):
            questions.setdefault(title, []).append(checked(row, where, len(parts) > 1 and title))
        check(title in questions, f"{source}: no questions for '{part}'")
    return [question for some in questions.values() for question in some]

def read_rows(name, config, split, part):
    with supplied(name):
        if ".json" in name:
            rows = read_lines(name)
        else:
            file = dict(path="parquet", data_files=name, split="train")
            hub = dict(path=name, name=config or None, split=split)
            rows = enumerate(load_dataset(**(file if os.path.exists(name) else hub)).to_list(), 1)
        for number, row in rows:
            check(isinstance(row, dict), f"{name}, row {number}: not an object")
            if "contents" not in row:
                yield row, f"{name}, row {number}"
            for question in row.get("questions") or []:  # about a passage of a corpus
                if question.get("split") == part:
                    yield question, f"{name}, row {number}"

def checked(row, where, title):
    with supplied(where):
        texts = [message[field] for message in row.get("prompt") or [] for field in ("role", "content")]
        said = texts and all(isinstance(text, str) and text.strip() for text in texts)
        check(row.get("prompt") is None or said, f"{where}: 'prompt' lacks a message, or a message content")
        question, answers = row.get("question") or "".join(texts[-1:]), row.get("golden_answers")
        if row.get("reward_model") and not answers:  # as Search-R1 keeps them
            answers = row["reward_model"]["ground_truth"]["target"]
        answers = answers if isinstance(answers, list) else [answers]
        answers = [str(answer) for answer in answers if isinstance(answer, (str, int, float))]
        check(isinstance(question, str) and question.strip(), f"{where}: 'question' must be a text")
        check("".join(answers).strip(), f"{where}: 'golden_answers' holds no answer")
        title = row.get("data_source") or title or (f"{row['hops']}hop" if "hops" in row else row.get("set"))
        return row | {"question": question, "golden_answers": answers, "set": title and str(title)}

def normalize_answer(text):
    """As Search-R1: lower case, no punctuation, no articles, single spaces."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())

def exact_match(prediction, golden_answers):
    """1.0 if the prediction equals a golden answer, both normalised, or as written where that leaves nothing
    of the answer, such as "A"; else 0.0, also for an empty prediction."""
    for answer in [golden_answers] if isinstance(golden_answers, str) else golden_answers:
        form = normalize_answer if normalize_answer(answer) else str.strip
        if form(prediction) and form(prediction) == form(answer):
            return 1.0
    return 0.0

ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
MARKS = r"\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff"  # accents, vowel signs: no \w
TERM = re.compile(rf"[{ALONE}]|(?:(?![{ALONE}])[\w{MARKS}])+")

def words(text):
    """Lower-case words, and characters of Thai, Chinese, ...: "It is .fr 東京" -> it, is, fr, 東, 京."""
    return TERM.findall(text.lower())

class BM25:
    """Okapi BM25 over passages (dicts with a string `contents`), as an inverted index.
        score(q, d) = sum over terms t of q: idf(t) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * |d| / avg|d|))
        idf(t)      = ln(1 + (n - df + 0.5) / (df + 0.5))                           (never negative)
    tf: how often t stands in d; df: how many of the n passages hold t; |d|: terms of d. A term that the query
    repeats counts each time. What a term adds to a passage's score is known when the index is built."""
    def __init__(self, passages, k1=1.2, b=0.75):
        self.passages, self.index = passages, {}  # term -> (its passages, what it adds to their scores)
        lengths = torch.zeros(len(passages), dtype=torch.float64)
        places = {}  # term -> its passages in rising order, each as often as the term stands in it
        for d, passage in enumerate(passages):
            terms = words(passage["contents"])
            lengths[d] = len(terms)
            for term in terms:
                places.setdefault(term, []).append(d)
        norm = k1 * (1 - b + b * lengths / (lengths.mean() or 1.0))
        for term, repeated in places.items():
            ids, tf = torch.tensor(repeated).unique_consecutive(return_counts=True)
            idf = math.log(1 + (len(passages) - len(ids) + 0.5) / (len(ids) + 0.5))
            self.index[term] = ids, tf.double() * (k1 + 1) / (tf + norm[ids]) * idf

    def search(self, queries, k):
        """The k best passages for each of the queries, best first, as copies with their `score`; ties stand
        in corpus order. Returns lists of dicts, shorter than k where fewer passages share a term."""
        found = []
        for query in queries:
            scores = torch.zeros(len(self.passages), dtype=torch.float64)
            for term in filter(self.index.get, words(query)):
                scores.index_add_(0, *self.index[term])
            least = scores.topk(max(1, min(k, len(scores)))).values[-1]  # of the k best
            ids = ((scores >= least) & (scores > 0)).nonzero()[:, 0]  # ascending; more than k if some tie
            order = scores[ids].sort(descending=True, stable=True).indices  # stable: ties in corpus order
            found.append([dict(self.passages[d], score=scores[d].item()) for d in ids[order[:k]].tolist()])
        return found

class ErringRetriever:
    """With probability `noise` a query finds passages about something else, each `instead_of` a right one."""
    def __init__(self, engine, passages, noise):
        self.engine, self.passages, self.noise = engine, passages, noise

    def search(self, queries, k):
        found = self.engine.search(queries, k)
        for hits, draw in zip(found, torch.rand(len(queries))):
            if draw < self.noise:
                for i, d in enumerate(torch.randint(len(self.passages), (len(hits),))):
                    hits[i] = dict(self.passages[d], instead_of=hits[i]["contents"])
        return found

PROMPT = """Answer the question. Whenever you learn something, reason first, between <think> and </think>.
If you lack a fact, search for it with <search> your query </search>; passages come back between <information>
and </information>. You may search several times. Once you know enough, finish with <answer> your answer in as
few words as possible </answer>.
Question: {question}
"""
CORRECTION = ("\n\nThis was neither a search nor an answer. Write <search> query </search> to search, or "
              "<answer> answer </answer> to finish.\n\n")
OPEN, CLOSE = "\n\n<information>", "</information>\n\n"
TAG = re.compile(r"</?(?:think|search|information|answer)>")

def information(passages):
    """Passages as text, one a line. A tag inside a passage is broken, so that it cannot close the block."""
    docs = [passage["contents"].partition("\n") for passage in passages]
    lines = [f"Doc {i}(Title: {title}) {text}" for i, (title, _, text) in enumerate(docs, 1)]
    return clean("\n".join(lines), TAG) or "No passage matches this query."

def between(tag, text):
    """Between the first </tag> and the last <tag> before it: "<a> x <a> y </a> z" -> "y"; or None."""
    head, closed, _ = text.partition(f"</{tag}>")
    _, opened, inside = head.rpartition(f"<{tag}>")
    return inside.strip() if opened and closed else None

REFUSED = urllib.error.HTTPError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError
class HTTPRetriever:
    """A server of Search-R1's protocol: to POST {"queries": [...], "topk": k, "return_scores": true} it sends
    {"result": [[{"document": {"contents": ...}, "score": x}, ...], ...]}, a list for each query."""
    def __init__(self, url, timeout=300, tries=7):
        check(re.match(r"https?://[^\s/]+", url), f"--retriever_url {url}: must begin with http://HOST")
        self.url, self.timeout, self.tries = url, timeout, tries

    def search(self, queries, k):
        """As BM25.search. Waits 1, 2, 4, ... seconds after a failure. OSError if the server is gone, or
        says so (503). If it refuses, each query is asked alone; one that is refused again finds nothing."""
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.tries if queries else 0):
            time.sleep(2 ** (attempt - 1) if attempt else 0)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    result = json.load(reply)["result"]
                documents = [[hit.get("document", hit) for hit in hits] for hits in result]
                return [[dict(d, contents="" + d["contents"]) for d in some]
                        for _, some in zip(queries, documents, strict=True)]
            except (OSError, *REFUSED) as error:
                failure = error
        if queries and (not isinstance(failure, REFUSED) or getattr(failure, "code", 0) > 500):
            raise OSError(f"retrieval server {self.url}: {failure!r}, {self.tries} times") from failure
        if len(queries) == 1:
            print(f"WARNING: {self.url} refuses the query {queries[0]!r}: {failure!r}", file=sys.stderr)
            return [[]]
        alone = HTTPRetriever(self.url, self.timeout, tries=1)
        return [alone.search([query], k)[0] for query in queries]

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not isinstance(asked["queries"], list):
                raise TypeError("'queries' must be a list of strings")
            found = self.server.engine.search(asked["queries"], asked.get("topk") or 3)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            return self.send_error(400, "Not a request in Search-R1's protocol", str(error))
        for hits in found:
            for i, hit in enumerate(hits):
                score, _ = hit.pop("score"), hit.pop("questions", None)  # questions would tell answers
                hits[i] = {"document": hit, "score": score} if asked.get("return_scores") else hit
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"result": found}).encode())

def serve(engine, port, host="127.0.0.1"):
    """A server for Search-R1's protocol in front of engine; port 0: any free one. See its serve_forever()."""
    ThreadingHTTPServer.request_queue_size = 1024  # connections that may wait; 5 are too few for a burst
    server = ThreadingHTTPServer((host, port), Handler)
    server.engine = engine
    return server

# --------------------------------------------------------------------------------------- the built-in agent
SEARCH = "<think> {thought}I look up {name} </think> <search> {query} </search>"
ANSWER = "<think> {thought}</think> <answer> {name} </answer>"

def tiny_agent(passages, questions, top_k):
    """(tokenizer, model), untrained: a Qwen2 of 0.17 million parameters that knows an episode's words."""
    texts = [CORRECTION, OPEN, CLOSE, SEARCH, ANSWER, information([]), information(passages[:top_k])]
    texts += [information([passage]) for passage in passages] + [q["question"] for q in questions]
    vocabulary, word = Tokenizer(models.WordLevel(unk_token="<unk>")), Regex(TAG.pattern + r"|\w+|[^\w\s]")
    vocabulary.pre_tokenizer = pre_tokenizers.Split(word, "removed", invert=True)
    vocabulary.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<eos>", "<unk>"]))
    tok = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<eos>", unk_token="<unk>")
    return tok, Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tok), hidden_size=64, intermediate_size=192, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.1, tokenizer_class="PreTrainedTokenizerFast"))

def scrambled(passages, questions):
    """A world where each name stands for another of its kind: engine, questions, {two names: their fact}."""
    kind = {q["path"][0]: q["question"].replace(q["path"][0], "") for q in questions if q["hops"] == 1}
    other = {}  # name -> the name that it gets in this world
    for same in dict.fromkeys(kind.values()):  # names that fit into the same question
        names = [name for name in kind if kind[name] == same]
        other.update(zip(names, random.sample(names, len(names))))
    def rename(text):
        return re.sub(r"\w+", lambda word: other.get(word[0], word[0]), text)
    world = [{"contents": rename(passage["contents"])} for passage in passages]
    texts = [passage["contents"].partition("\n")[2] for passage in world]
    facts = {frozenset(other.keys() & re.findall(r"\w+", text)): text for text in texts}
    asked = [dict(q, question=rename(q["question"]), path=[*map(rename, q["path"])]) for q in questions]
    return BM25(world), asked, facts

def demonstrate(env, engine, question, questions, facts):
    """A scripted episode, imperfect on purpose: it answers too early, goes astray, misreads. Where the engine
    errs, as in training, it searches again, or takes a name from a useless passage for the answer."""
    path, thought, hop, again, e = question["path"], "", 0, False, env.reset(question)
    def act(text):
        ids = env.encode(text)
        e.ids, e.action_id = e.ids + ids, e.action_id + [e.turn] * len(ids)
        env.respond([e])
    while hop < question["hops"] and e.turn <= env.cfg.max_turns:
        if hop == 1 and not again and random.random() < env.cfg.early_answers:
            break
        if not again and random.random() < 0.1:  # goes after something else
            path = random.choice([q["path"] for q in questions if q["hops"] == question["hops"]])
        query = path[hop]
        if hop == 0 and random.random() < 0.5:
            query = question["question"].replace(question["path"][0], path[0])
        errs = random.random() < env.cfg.retrieval_noise
        found = ErringRetriever(engine, engine.passages, float(errs)).search([query], env.cfg.top_k)
        env.retriever = argparse.Namespace(search=lambda queries, k: found[:len(queries)])
        act(SEARCH.format(thought=thought, name=path[hop], query=query))
        again = errs and random.random() < 0.4 and e.turn <= env.cfg.max_turns
        thought = "" if again else found[0][0]["contents"].partition("\n")[2] + " "
        if errs and not again:
            name = random.choice([w for w in re.findall(r"\w+", thought) if w in set().union(*facts)] or path)
            break
        if not errs:
            thought = facts[frozenset(path[hop:hop + 2])] + " "
            name = path[hop + 1] if random.random() < 0.95 else random.choice(questions)["path"][0]
            hop += 1
    act(ANSWER.format(thought=thought, name=name))
    return e

def lessons(env, passages, questions, steps):
    """Yields `steps` batches of 16 scripted episodes; after every eighth the world is another."""
    env = copy.copy(env)
    for step in range(steps):
        if step % 8 == 0:
            engine, asked, facts = scrambled(passages, questions)
        yield [demonstrate(env, engine, random.choice(asked), asked, facts) for _ in range(16)]

def main():
    parser = argparse.ArgumentParser(description="Serves BM25 over a corpus, in Search-R1's protocol.")
    parser.add_argument("--corpus", default=os.path.join(os.path.dirname(__file__), "tiny_corpus.jsonl"))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to other machines")
    args = parser.parse_args()
    with supplied(f"--host {args.host} --port {args.port}"):
        serve(BM25(load_corpus(args.corpus)), args.port, args.host).serve_forever()

if __name__ == "__main__":
    main()
