# SPDX-License-Identifier: MIT
"""What is searched and asked: corpus, questions, search engines. Then the built-in agent's lessons.
    >>> BM25(load_corpus("tiny_corpus.jsonl")).search(["capital Paris"], k=1)[0][0]["contents"]
    '"Paris"\\nParis is the capital of France.'
"""
import argparse, contextlib, copy, glob, gzip, http.client, http.server, json, math, os, pathlib
import random, re, string, sys, time, torch, urllib.request
from datasets import load_dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
# --------------------------------------------------------------------------- mistakes of the user
def stop(message):  # of torchrun's processes, which all stop, one says why
    if os.environ.get("RANK", "0") in ("0", ""): print("error:", message, file=sys.stderr)
    sys.exit(2)
def check(ok, message):
    if not ok: stop(message)
@contextlib.contextmanager
def blame(what, errors=Exception):
    """An error in this block is the fault of `what`, which the user supplied: stop() names both."""
    try: yield
    except errors as error:
        (cause, _), *_ = getattr(error, "failures", {0: (error, None)}).values()  # a checkpoint's
        stop(f"{what}: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}")
# -------------------------------------------------------------------------- corpus and questions
def read_rows(name, config=None, split=None):  # yields (row, "NAME, row N") of a file or data set
    with blame(name):
        if name.lower().endswith((".json", ".jsonl", ".gz")):
            text = pathlib.Path(name).read_bytes()
            if name.lower().endswith(".gz"): text = gzip.decompress(text)
            rows = json.loads(text) if text.startswith(b"[") else text.splitlines()
        elif name.lower().endswith(".parquet"):  # escape: a * in a name is no pattern
            rows = load_dataset("parquet", data_files=glob.escape(name), split="train")
        else: rows = load_dataset(name, config, split=split)
    for number, row in enumerate(rows, 1):
        with blame(f"{name}, row {number}"):
            if isinstance(row, bytes): row = json.loads(row.strip() or "{}")  # a line
        if row != {}: yield row, f"{name}, row {number}"  # {}: the line was empty
def load_corpus(path):  # passages as in Search-R1: dicts with `contents`, '"Title"\\ntext'
    rows = list(read_rows(str(path)))
    check(rows, f"{path}: the corpus is empty")
    for row, where in rows:
        with blame(f"{where}: no text 'contents'"): row["contents"].strip()
    return [row for row, _ in rows]

def load_questions(sources, part):
    """Questions of a file, corpus, or NAME[:CONFIG[:SPLIT]] (else `part`) on the hub, or of several
    with commas between: dicts with "question", "golden_answers" (a list), "set", "where", ..."""
    entries = [sources] if os.path.exists(sources) else sources.split(",")  # a path may hold commas
    files, sets = [os.path.basename(source) for source in entries], {}  # sets: name -> questions
    for source in entries:
        fields = [source] if os.path.exists(source) else source.split(":", 2)
        name, config, split = fields + [None] * (3 - len(fields))
        title = config or os.path.basename(name).partition(".")[0]
        if files.count(os.path.basename(source)) > 1:  # nq/dev.json,hotpot/dev.json: nq_dev, ...
            title = f"{os.path.basename(os.path.dirname(os.path.abspath(name)))}_{title}"
        check(title not in sets, f"{sources}: two sets have the name {title}")
        sets[title] = []
        for row, where in read_rows(name, config or None, split or part):
            with blame(where):
                rows = [row] if row.get("question") or row.get("prompt") or "contents" not in row else [
                    q for q in row.get("questions") or [] if q["split"] == part]  # about a passage
                sets[title] += [checked(q, where, title if files[1:] else None) for q in rows]
        check(sets[title], f"{source}: no questions for '{part}'")
    return sum(sets.values(), [])

def checked(row, where, title):  # as load_questions returns it; title: its set, if it names none
    verl = (row.get("reward_model") or {}).get("ground_truth")
    verl = verl.get("target") if isinstance(verl, dict) else verl  # Search-R1 has it a step deeper
    for answers in (row.get("golden_answers"), verl, row.get("answer")):
        if isinstance(answers, str) and answers.startswith("["):  # a list, written as text?
            with contextlib.suppress(ValueError): answers = json.loads(answers)
        answers = answers if isinstance(answers, list) else [answers]
        answers = [str(text) for text in answers if isinstance(text, (str, int, float))]
        answers = [text for text in answers if text.strip() not in ("", "nan")]
        if answers: break
    texts = [m[field].strip() for m in row.get("prompt") or [] for field in ("role", "content")]
    question = row.get("question") or "".join(texts[-1:])
    check(question.strip() and all(texts) and answers, f"{where} needs 'golden_answers', and "
          "'question' or a 'prompt' of messages with 'role' and 'content'")
    title = title or (f"{row['hops']}hop" if row.get("hops") else row.get("set"))
    title = str(row.get("data_source") or title or "") or None
    check(title != "average", f"{where}: no set may have the name of the mean of all, average")
    return row | {"question": question, "golden_answers": answers, "set": title, "where": where}
def normalize_answer(text):  # as Search-R1: lower case, no punctuation, articles, double spaces
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())
def exact_match(prediction, golden_answers):  # 1.0 if it is one of them, both normalised, or 0.0
    for answer in [golden_answers] if isinstance(golden_answers, str) else golden_answers:
        form = normalize_answer if normalize_answer(answer) else str.strip  # of "A" nothing is left
        if form(prediction) and form(prediction) == form(answer): return 1.0
    return 0.0
# ----------------------------------------------------------------------------------------- search
# ALONE: characters of Thai, Chinese, ..., each a term. SIGNS: accents, vowel signs, which \w lacks.
ALONE = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
         "\U00020000-\U0003ffff")
SIGNS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
TERM = re.compile(rf"[{ALONE}]|(?:[^\W{ALONE}]|[{SIGNS}])+")  # [^\W...]: letters other than these
def words(text):  # in lower case: "It is .fr 東京" -> it, is, fr, 東, 京
    return TERM.findall(text.lower())

class BM25:
    """Okapi BM25: the score of a passage is the sum of idf * tf * (k1 + 1) / (tf + norm) over the
    query's terms; tf: how often the passage holds the term; idf, norm: see below."""
    def __init__(self, passages, k1=1.2, b=0.75):
        self.passages, self.index = passages, {}  # term -> (its passages, what it adds to scores)
        lengths, places = torch.zeros(len(passages), dtype=torch.float64), {}
        for d, passage in enumerate(passages):
            terms = words(passage["contents"])
            lengths[d] = len(terms)
            for term in terms: places.setdefault(term, []).append(d)  # d as often as it holds term
        norm = k1 * (1 - b + b * lengths / lengths.mean())
        for term, repeated in places.items():
            ids, tf = torch.tensor(repeated).unique_consecutive(return_counts=True)
            idf = math.log(1 + (len(passages) - len(ids) + 0.5) / (len(ids) + 0.5))
            self.index[term] = ids, tf.double() * (k1 + 1) / (tf + norm[ids]) * idf
    def search(self, queries, k):
        """For each query the k best passages that share a term, copies with `score`. topk is fast,
        but mixes ties: it finds the k-th score; what reaches it is sorted, stably to keep ties."""
        found = []
        for query in queries:
            scores = torch.zeros(len(self.passages), dtype=torch.float64)
            for term in words(query):
                if term in self.index: scores.index_add_(0, *self.index[term])
            least = scores.topk(max(1, min(k, len(scores)))).values[-1]
            ids = ((scores >= least) & (scores > 0)).nonzero()[:, 0]
            best = ids[scores[ids].argsort(descending=True, stable=True)[:k]].tolist()
            found.append([self.passages[d] | {"score": scores[d].item()} for d in best])
        return found

class ErringRetriever:  # with probability `noise` a query finds random passages
    def __init__(self, engine, passages, noise):
        self.engine, self.passages, self.noise = engine, passages, noise
    def search(self, queries, k):
        found = self.engine.search(queries, k)
        for hits in found:
            if torch.rand(()) < self.noise:
                for i, d in enumerate(torch.randint(len(self.passages), (len(hits),))):
                    hits[i] = self.passages[d] | {"instead_of": hits[i]["contents"]}
        return found

class HTTPRetriever:
    """A server of Search-R1's protocol: {"queries": [...], "topk": k, "return_scores": true} gets
    {"result": [[{"document": {"contents": ...}, "score": x}, ...], ...]}, a list for each query.
    It may be busy (no connection, time-out, overload), which will pass, or refuse (all else)."""
    def __init__(self, url, timeout=300, tries=7):
        self.url, self.timeout, self.tries, self.in_vain = url, timeout, tries, 0
        with blame(f"--retriever_url {url} must be http://HOST:PORT/PATH"):
            parts, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies()
            local = re.match(r"localhost$|127\.|::1$", parts.hostname)  # no proxy leads there
            if local or urllib.request.proxy_bypass(f"{parts.hostname}:{parts.port}"): proxies = {}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        self.name = f"--retriever_url {url}" + (f", proxies {proxies}" if proxies else "")
    def request(self, queries, k, tries):  # None if it refuses; OSError if busy in all tries
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        for attempt in range(tries):
            try:
                asked = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
                result = json.load(self.opener.open(asked, timeout=self.timeout))["result"]
                found = [[hit.get("document", hit) for hit in hits[:k]] for hits in result]
                texts = [passage["contents"].strip() for passage in sum(found, [])]  # all are text?
                if len(found) != len(queries): raise ValueError(f"{len(found)} lists, {texts}")
                self.in_vain = 0
                return found
            except Exception as error:
                code, cause = getattr(error, "code", 503), f"{self.name}: {error!r:.300}"
                busy = isinstance(error, (OSError, http.client.HTTPException))
                if not busy or code <= 500 and code not in (408, 429):
                    return print(f"WARNING: {cause}: refuses {str(queries)[:99]}", file=sys.stderr)
                wait = getattr(error, "headers", {}).get("Retry-After", "")  # seconds, or a date
            if attempt < tries - 1: time.sleep(int(wait) if wait.isdecimal() else 2 ** attempt)
        raise OSError(f"{cause}, {tries} times")
    def search(self, queries, k):
        """As BM25.search. If refused, each query is asked alone, for one may have spoilt it; then
        it finds nothing if refused. OSError: busy, or three requests in a row wholly in vain."""
        found = self.request(queries, k, self.tries) if queries else []
        if found is None:
            self.in_vain += 1  # any answer sets it to 0
            found = [(self.request([query], k, self.tries) or [[]])[0] for query in queries]
            if self.in_vain == 3: raise OSError(f"{self.name}: refused all of three requests")
        return found
    def probe(self):
        with blame(self.name): check(self.request(["capital"], 1, tries=1) is not None, self.name)

class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 60  # seconds: a client that never ends its request does not hold a thread for ever
    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(min(abs(int(self.headers["Content-Length"])), 10**8)))
            queries, k = asked["queries"], 3 if asked.get("topk") is None else asked["topk"]
            if type(queries) is not list or type(k) is not int or k < 1: raise TypeError(asked)
            result = self.server.engine.search(queries, k)
        except Exception as error:
            return self.send_error(400, "Not a request in Search-R1's protocol", repr(error)[:300])
        for hits in result:
            for i, hit in enumerate(hits):
                score, _ = hit.pop("score"), hit.pop("questions", None)  # they tell the answers
                hits[i] = {"document": hit, "score": score} if asked.get("return_scores") else hit
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"result": result}).encode())
def serve(engine, port, host="127.0.0.1"):  # serve_forever() starts it; port 0: any free one
    http.server.ThreadingHTTPServer.request_queue_size = 1024  # that wait; 5 are few for a burst
    server = http.server.ThreadingHTTPServer((host, port), Handler)
    server.engine, server.handle_error = engine, lambda *_: None  # quiet if a client has left
    return server
# --------------------------------------------------------------- how passages stand in an episode
PROMPT = """Answer the question. Whenever you learn something, reason first, between <think> and
</think>. If you lack a fact, search for it with <search> your query </search>; passages come back
between <information> and </information>. You may search several times. Once you know enough, finish
with <answer> your answer in as few words as possible </answer>.\nQuestion: {question}\n"""
CORRECTION = ("\n\nThis was neither a search nor an answer. Write <search> query </search> to "
              "search, or <answer> answer </answer> to finish.\n\n")
OPEN, CLOSE = "\n\n<information>", "</information>\n\n"
TAG = re.compile(r"</?(?:think|search|information|answer)>")
def clean(text, forbidden):  # "</a>", if forbidden, becomes "< /a>"; half a character, "\ufffd"
    for name in forbidden: text = text.replace(name, name[:1] + " " + name[1:])
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
def format_passages(passages):  # one a line; tags are broken, so that they cannot end the block
    parts = [passage["contents"].partition("\n") for passage in passages]
    lines = [f"Doc {i}(Title: {title}) {text}" for i, (title, _, text) in enumerate(parts, 1)]
    return clean("\n".join(lines), TAG.findall(str(lines))) or "No passage matches this query."
def text_in_tag(tag, text):  # before the first </a>: "<a> x <a> y </a> z" -> "y"; or None
    before, closed, _ = text.partition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside.strip() if opened and closed else None
# -------------------------------------------------------------------- the built-in agent's lessons
# The built-in agent starts with random weights. Before GRPO it imitates scripted episodes, each in
# a scrambled world, where Kabul may be Peru's capital: it cannot learn facts, only to look them up.
# The script errs on purpose, since GRPO learns from right and wrong answers. Most of all GRPO shall
# cure an answer after one search of two, whose probability is --early_answers. The other choices:
GOES_ASTRAY = 0.1     # before a search: it goes on with another question, so that it answers wrong
ASKS_IN_FULL = 0.5    # its first query is the question, not a name: the agent shall try both
SEARCHES_AGAIN = 0.4  # after a search without the fact; else it answers with the last name it knows
READS_RIGHT = 0.95    # it takes the right name out of a passage, not any name
SEARCH = "<think> {thought}I look up {name} </think> <search> {query} </search>"
ANSWER = "<think> {thought}</think> <answer> {name} </answer>"

def tiny_agent(passages, questions, top_k):
    """(tokenizer, model), untrained: a Qwen2 of 0.17 million parameters with an episode's words."""
    texts = [CORRECTION, OPEN, CLOSE, SEARCH, ANSWER] + [q["question"] for q in questions]
    texts += map(format_passages, [[], passages[:top_k], *([passage] for passage in passages)])
    vocab = Tokenizer(models.WordLevel(unk_token="<unk>"))
    token = Regex(TAG.pattern + r"|\w+|[^\w\s]")  # a tag, a word or a punctuation mark
    vocab.pre_tokenizer = pre_tokenizers.Split(token, "removed", invert=True)  # not these
    vocab.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<eos>", "<unk>"]))
    tok = PreTrainedTokenizerFast(tokenizer_object=vocab, eos_token="<eos>", unk_token="<unk>")
    return tok, Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tok), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, initializer_range=0.1, tokenizer_class="PreTrainedTokenizerFast"))
def check_lessons(passages, questions):  # path: the names that lead to the answer
    known = {word for passage in passages for word in re.findall(r"\w+", passage["contents"])}
    for q in questions:
        good = known.issuperset(q.get("path") or [0]) and len(q["path"]) - 1 == q.get("hops") > 0
        check(good, f"--warm_steps: {q.get('where')} needs a 'path' of 'hops' + 1 words of passages")
def scrambled(passages, questions):
    """Both in a world where names change places, if they fit into the same question's gap, ___."""
    one_hop, new_names = [q for q in questions if q["hops"] == 1], {}
    gaps = {q["path"][0]: q["question"].replace(q["path"][0], "___") for q in one_hop}
    for gap in dict.fromkeys(gaps.values()):  # each once, and in order
        names = [name for name in gaps if gaps[name] == gap]
        new_names.update(zip(names, random.sample(names, len(names))))
    def rename(text): return re.sub(r"\w+", lambda word: new_names.get(word[0], word[0]), text)
    paths = [[rename(name) for name in q["path"]] for q in questions]
    return [{"contents": rename(passage["contents"])} for passage in passages], [
        {"question": rename(q["question"]), "golden_answers": path[-1:], "hops": q["hops"],
         "path": path} for q, path in zip(questions, paths)]

def demonstrate(env, question, questions):  # a search for each name but the last, then the answer
    e, path = env.reset(question), question["path"]
    hop, thought, answer = 0, "", path[0]
    def act(text):  # as if the model had written it; returns the feedback
        ids, start = env.encode(text), len(e.ids)
        e.ids, e.action_id = e.ids + ids, e.action_id + [e.turn] * len(ids)
        env.respond([e])
        return env.tok.decode(e.ids[start:])
    while hop < question["hops"] and e.turn <= env.cfg.max_turns:
        if hop == 1 and random.random() < env.cfg.early_answers: break
        if random.random() < GOES_ASTRAY:
            path = random.choice([q["path"] for q in questions if q["hops"] == question["hops"]])
        in_full = hop == 0 and random.random() < ASKS_IN_FULL
        query = question["question"].replace(question["path"][0], path[0]) if in_full else path[hop]
        feedback = act(SEARCH.format(thought=thought, name=path[hop], query=query))
        texts = re.split(r"Doc \d+ ?\(.*?\)", text_in_tag("information", feedback))
        facts = [t for t in texts if set(path[hop:hop + 2]) <= set(re.findall(r"\w+", t))]
        if facts:
            hop, thought, answer = hop + 1, facts[0].strip() + " ", path[hop + 1]
            if random.random() > READS_RIGHT: answer = random.choice(questions)["path"][0]
        elif random.random() > SEARCHES_AGAIN: break
    act(ANSWER.format(thought=thought, name=answer))
    return e
def lessons(env, passages, questions, steps):  # yields `steps` batches of 16 scripted episodes
    env = copy.copy(env)  # gets a retriever of its own
    for step in range(steps):
        if step % 8 == 0:
            world, asked = scrambled(passages, questions)
            env.retriever = ErringRetriever(BM25(world), world, env.cfg.retrieval_noise)
        yield [demonstrate(env, random.choice(asked), asked) for _ in range(16)]
def keep_fitting(env, questions, context):
    """The questions of --hops searches whose longest possible episode fits into the context."""
    some, hops = [], env.cfg.hops
    for q in questions:
        with blame(f"{q['where']}: prompt"):
            fits = len(env.reset(q).ids) + env.longest <= context
        if fits and hops in (0, q.get("hops", hops)):
            some.append(q)
    print(len(some), "of", len(questions), "questions fit --hops and the model's context")
    check(some, f"no question of --hops {hops} fits into {context} tokens with --max_turns turns")
    return some

def main():
    parser = argparse.ArgumentParser(description="BM25 over a corpus, in Search-R1's protocol.")
    parser.add_argument("--corpus", default=__file__.replace("retriever.py", "tiny_corpus.jsonl"))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to other machines")
    args = parser.parse_args()
    check(args.host, "--host is empty; 0.0.0.0 stands for all addresses of this machine")
    with blame(f"--host {args.host}:{args.port}"), contextlib.suppress(KeyboardInterrupt):
        serve(BM25(load_corpus(args.corpus)), args.port, args.host).serve_forever()
if __name__ == "__main__": main()
