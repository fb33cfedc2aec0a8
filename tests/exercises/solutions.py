"""Right and wrong solutions of the exercises, to test the grader with; not for students.

For each exercise: solutions that are as right as the reference but written differently, and
plausible wrong ones. A wrong solution is an edit of the first right one, so that it holds exactly
one mistake: (name, old text, new text, ...), where every old text occurs in it.
"""
from typing import NamedTuple


class Solutions(NamedTuple):
    right: dict[str, str]  # name -> source of the functions
    wrong: list[tuple[str, ...]]  # (name, old, new, old, new, ...)

    def wrong_sources(self) -> dict[str, str]:
        """Returns name -> source. Raises ValueError where an edit does not fit."""
        sources = {}
        for name, *edits in self.wrong:
            source = next(iter(self.right.values()))
            for old, new in zip(edits[::2], edits[1::2], strict=True):
                if old not in source:
                    raise ValueError(f"{name}: {old!r} is not there")
                source = source.replace(old, new)
            sources[name] = source
        return sources


SOLUTIONS: dict[int, Solutions] = {}

# --- 1: the budget and random masking -------------------------------------------------------------

SOLUTIONS[1] = Solutions({"topk and loops": '''
def budget(maskable, rate, generator=None):
    wanted = maskable.sum(1).double() * rate
    noise = torch.rand(len(wanted), generator=generator)
    return (wanted + noise).floor().long()


def top_k(scores, maskable, k):
    mask = torch.zeros_like(maskable)
    for row in range(len(scores)):
        there = maskable[row].nonzero().flatten()
        n = min(int(k[row]), len(there))
        best = scores[row, there].topk(n).indices
        mask[row, there[best]] = True
    return mask


def random_mask(maskable, rate, generator=None):
    noise = torch.rand(maskable.shape, generator=generator)
    return top_k(noise, maskable, budget(maskable, rate, generator))
''', "a permutation of each row": '''
def budget(maskable, rate, generator=None):
    exact = rate * maskable.sum(1)
    return (exact.floor() + torch.bernoulli(exact - exact.floor(), generator=generator)).long()


def top_k(scores, maskable, k):
    order = torch.where(maskable, scores, scores.min() - 1).argsort(1, descending=True)
    rank = order.argsort(1)
    return (rank < k[:, None]) & maskable


def random_mask(maskable, rate, generator=None):
    chosen = []
    for row, k in zip(maskable, budget(maskable, rate, generator)):
        there = row.nonzero().flatten()
        order = torch.randperm(len(there), generator=generator)
        chosen.append(torch.zeros_like(row).index_fill(0, there[order[:k]], True))
    return torch.stack(chosen)
''', "numbers of other types": '''
def budget(maskable, rate, generator=None):
    wanted = rate * maskable.sum(1)
    return (wanted + torch.rand(len(wanted), generator=generator)).floor()


def top_k(scores, maskable, k):
    rank = scores.masked_fill(~maskable, -torch.inf).argsort(1, descending=True).argsort(1)
    return ((rank < k[:, None]) & maskable).to(torch.uint8)


def random_mask(maskable, rate, generator=None):
    draws = torch.rand(maskable.shape, generator=generator)
    return top_k(draws, maskable, budget(maskable, rate, generator)).numpy()
'''}, [
    ("rounds to the nearest", "(wanted + noise).floor()", "wanted.round()"),
    ("rounds up always", "(wanted + noise).floor()", "wanted.ceil()"),
    ("rounds down always", "(wanted + noise).floor()", "wanted.floor()"),
    ("at least one a row", "(wanted + noise).floor()", "(wanted + noise).floor().clamp(min=1)"),
    ("one coin for the batch", "torch.rand(len(wanted), ", "torch.rand(1, "),
    ("counts padding", "maskable.sum(1)", "(maskable | True).sum(1)"),
    ("the budget ignores its generator", "torch.rand(len(wanted), generator=generator)",
     "torch.rand(len(wanted))"),
    ("the mask ignores its generator", "torch.rand(maskable.shape, generator=generator)",
     "torch.rand(maskable.shape)"),
    ("the same positions in every row", "torch.rand(maskable.shape, generator=generator)",
     "torch.rand(maskable.shape[1], generator=generator).expand(maskable.shape)"),
    ("a coin for each token", "top_k(noise, maskable, budget(maskable, rate, generator))",
     "(noise < rate) & maskable"),
    ("the first tokens", "return top_k(noise, ", "return top_k(0 * noise, "),
    ("the lowest scores", ".topk(n)", ".topk(n, largest=False)"),
    ("padding may be chosen", "maskable[row].nonzero()",
     "torch.ones_like(maskable[row]).nonzero()"),
    ("one too few", "min(int(k[row]), len(there))", "max(0, min(int(k[row]), len(there)) - 1)"),
    ("one k for all rows", "int(k[row])", "int(k[0])"),
    ("all that equal the last one chosen", "mask[row, there[best]] = True",
     "mask[row, there[scores[row, there] >= (scores[row, there[best]].min() if n else 9)]] = True"),
])

# --- 2: corruption --------------------------------------------------------------------------------

SOLUTIONS[2] = Solutions({"a list of the ordinary words": '''
def corrupt(input_ids, mask, mask_token_id, vocab_size, split=(0.8, 0.1, 0.1), generator=None,
            special_ids=()):
    labels = torch.full_like(input_ids, -100)
    labels[mask] = input_ids[mask]
    words = torch.tensor([v for v in range(vocab_size) if v not in special_ids])
    dice = torch.rand(input_ids.shape, generator=generator)
    corrupted = input_ids.clone()
    corrupted[mask & (dice < split[0])] = mask_token_id
    swap = mask & (dice >= split[0]) & (dice < split[0] + split[1])
    number = torch.randint(len(words), (int(swap.sum()),), generator=generator)
    corrupted[swap] = words[number]
    return corrupted, labels
''', "a loop over tokens": '''
def corrupt(input_ids, mask, mask_token_id, vocab_size, split=(0.8, 0.1, 0.1), generator=None,
            special_ids=()):
    corrupted, labels = input_ids.clone(), input_ids.clone()
    ordinary = sorted(set(range(vocab_size)) - set(special_ids))
    shares = torch.tensor(split).float()
    fates = torch.multinomial(shares, input_ids.numel(), True, generator=generator)
    fates = fates.reshape(input_ids.shape).tolist()
    words = torch.randint(len(ordinary), input_ids.shape, generator=generator).tolist()
    for row, masked in enumerate(mask.tolist()):
        for column, is_masked in enumerate(masked):
            if not is_masked:
                labels[row, column] = -100
            elif fates[row][column] == 0:
                corrupted[row, column] = mask_token_id
            elif fates[row][column] == 1:
                corrupted[row, column] = ordinary[words[row][column]]
    return corrupted, labels
''', "numbers of other types": '''
def corrupt(input_ids, mask, mask_token_id, vocab_size, split=(0.8, 0.1, 0.1), generator=None,
            special_ids=()):
    words = torch.tensor([v for v in range(vocab_size) if v not in special_ids])
    dice = torch.rand(input_ids.shape, generator=generator)
    other = words[torch.randint(len(words), input_ids.shape, generator=generator)]
    corrupted = torch.where(dice < split[0], mask_token_id, other)
    corrupted = torch.where(dice < split[0] + split[1], corrupted, input_ids)
    corrupted = torch.where(mask, corrupted, input_ids).int()
    return [corrupted, torch.where(mask, input_ids, -100).double().numpy()]
'''}, [
    ("labels everywhere", "torch.full_like(input_ids, -100)", "input_ids.clone()"),
    ("labels of 0 off the mask", "-100", "0"),
    ("labels are what the model reads", "return corrupted, labels",
     "return corrupted, corrupted.masked_fill(~mask, -100)"),
    ("labels only where the token changed", "return corrupted, labels",
     "return corrupted, labels.masked_fill(corrupted == input_ids, -100)"),
    ("in place", "input_ids.clone()", "input_ids"),
    ("random words may be special", "if v not in special_ids", ""),
    ("never the last word", "torch.randint(len(words), ", "torch.randint(len(words) - 1, "),
    ("one random word a batch", "words[number]", "words[number[:1]]"),
    ("ignores the generator of the fates", "input_ids.shape, generator=generator",
     "input_ids.shape"),
    ("ignores the generator of the words", "(int(swap.sum()),), generator=generator",
     "(int(swap.sum()),)"),
    ("the 10 per cent of what is left", "dice < split[0] + split[1]",
     "torch.rand(dice.shape, generator=generator) < split[1]"),
    ("random and kept exchanged", "dice < split[0] + split[1]", "dice < split[0] + split[2]"),
    ("no random words", "corrupted[swap] = words[number]", "number"),
    ("one die a row", "torch.rand(input_ids.shape, generator=generator)",
     "torch.rand(len(input_ids), 1, generator=generator).expand(input_ids.shape)"),
    ("corrupts unmasked tokens too", "corrupted[mask & (dice < split[0])]",
     "corrupted[dice < split[0]]"),
    ("eight tenths of the masked tokens, exactly",
     "dice = torch.rand(input_ids.shape, generator=generator)",
     "dice = torch.zeros(input_ids.shape)\n    n = int(mask.sum())\n"
     "    dice[mask] = (torch.randperm(n, generator=generator) + 0.999) / max(n, 1)"),
    ("half of them, exactly, rounded at random",
     "dice = torch.rand(input_ids.shape, generator=generator)",
     "dice = torch.zeros(input_ids.shape)\n    n = int(mask.sum())\n"
     "    dice[mask] = (torch.randperm(n, generator=generator) "
     "+ torch.rand(1, generator=generator)) / max(n, 1)"),
])

# --- 3: attention ---------------------------------------------------------------------------------

SOLUTIONS[3] = Solutions({"one einsum a step": '''
def forward(self, query_hidden, hidden, key_mask=None):
    H = hidden.shape[-1]
    d = H // self.heads
    q = self.query(query_hidden).unflatten(-1, (self.heads, d))
    k = self.key(hidden).unflatten(-1, (self.heads, d))
    v = self.value(hidden).unflatten(-1, (self.heads, d))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores / d ** 0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, -math.inf)
    weights = scores.softmax(-1)
    weights = self.dropout(weights)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    mixed = mixed.flatten(2)
    return self.output(mixed)
''', "a loop over heads": '''
def forward(self, query_hidden, hidden, key_mask=None):
    d = hidden.shape[-1] // self.heads
    mixed = []
    for head in range(self.heads):
        part = slice(head * d, head * d + d)
        q = self.query(query_hidden)[..., part]
        k, v = self.key(hidden)[..., part], self.value(hidden)[..., part]
        scores = torch.bmm(q * d ** -0.5, k.mT)
        if key_mask is not None:
            scores = scores + torch.where(key_mask[:, 0], 0.0, -1e30)
        scores = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = scores / scores.sum(-1, keepdim=True)
        mixed.append(F.dropout(weights, self.dropout.p, self.training) @ v)
    return self.output(torch.cat(mixed, -1))
''', "heads split in another shape, one after the other": '''
class SelfAttention:
    def split_heads(self, x):
        B, L, H = x.shape
        return x.reshape(B, L, self.heads, H // self.heads).permute(2, 0, 1, 3)

    def forward(self, query_hidden, hidden, key_mask=None):
        q, k, v = (self.split_heads(part(x)) for part, x in (
            (self.query, query_hidden), (self.key, hidden), (self.value, hidden)))
        mixed = []
        for head in range(self.heads):
            scores = q[head].matmul(k[head].mT) * q.shape[-1] ** -0.5
            if key_mask is not None:
                scores[~key_mask[:, 0].expand_as(scores)] = -torch.inf
            mixed.append(self.dropout(scores.softmax(-1)).matmul(v[head]))
        return self.output(torch.stack(mixed, 2).flatten(2))
'''}, [
    ("softmax over the batch", "softmax(-1)", "softmax(0)"),
    ("softmax over the queries", "softmax(-1)", "softmax(-2)"),
    ("softmax over the heads", "softmax(-1)", "softmax(1)"),
    ("no scale", "scores / d ** 0.5", "scores"),
    ("scaled by the whole width", "scores / d ** 0.5", "scores / H ** 0.5"),
    ("scaled by d", "scores / d ** 0.5", "scores / d"),
    ("queries and keys exchanged", "self.query(query_hidden)", "self.key(query_hidden)",
     "self.key(hidden)", "self.query(hidden)"),
    ("masked scores are 0", "-math.inf", "0"),
    ("the mask is upside down", "~key_mask", "key_mask"),
    ("the mask after the softmax", ".masked_fill(~key_mask, -math.inf)", "",
     "self.dropout(weights)",
     "self.dropout(weights if key_mask is None else weights * key_mask)"),
    ("no mask", ".masked_fill(~key_mask, -math.inf)", ""),
    ("no dropout", "self.dropout(weights)", "weights"),
    ("dropout on the output", "self.dropout(weights)", "weights", "mixed.flatten(2)",
     "self.dropout(mixed.flatten(2))"),
    ("dropout on the scores", "self.dropout(weights)", "weights", "scores.softmax",
     "self.dropout(scores).softmax"),
    ("dropout in evaluation too", "self.dropout(weights)", "F.dropout(weights, self.dropout.p)"),
    ("heads put together in another order", "mixed.flatten(2)", "mixed.transpose(2, 3).flatten(2)"),
    ("one head", "d = H // self.heads", "d = H", "(self.heads, d)", "(1, d)"),
    ("no output layer", "self.output(mixed)", "mixed"),
    ("everybody asks", "self.query(query_hidden)", "self.query(hidden)"),
    ("queries answer as well", "H = hidden.shape[-1]",
     "hidden, H = query_hidden, hidden.shape[-1]"),
    ("values are the keys", "self.value(hidden)", "self.key(hidden)"),
    ("values of nothing but the hidden states", "self.value(hidden)", "hidden"),
    ("heads split without a transpose",
     "self.query(query_hidden).unflatten(-1, (self.heads, d))",
     "self.query(query_hidden).reshape(len(hidden), self.heads, -1, d).transpose(1, 2)",
     "self.key(hidden).unflatten(-1, (self.heads, d))",
     "self.key(hidden).reshape(len(hidden), self.heads, -1, d).transpose(1, 2)",
     "self.value(hidden).unflatten(-1, (self.heads, d))",
     "self.value(hidden).reshape(len(hidden), self.heads, -1, d).transpose(1, 2)",
     "mixed.flatten(2)", "mixed.transpose(1, 2).reshape(len(hidden), -1, H)"),
    ("weights without a gradient", "self.dropout(weights)", "self.dropout(weights.detach())"),
    ("heads put together without a transpose", "bhqk,bkhd->bqhd", "bhqk,bkhd->bhqd",
     "mixed.flatten(2)", "mixed.reshape(len(hidden), -1, H)"),
    ("nan under the mask", ".masked_fill(~key_mask, -math.inf)",
     ".masked_fill(~key_mask, -math.inf) * key_mask"),
])

# --- 4: the block ---------------------------------------------------------------------------------

SOLUTIONS[4] = Solutions({"columns at the end": '''
def forward(self, hidden, key_mask=None, queries=None):
    attended = self.attention(hidden, hidden, key_mask)
    attended = self.dropout(attended)
    middle = self.attention_norm(hidden + attended)
    fed = self.output(F.gelu(self.intermediate(middle)))
    fed = self.dropout(fed)
    out = self.output_norm(middle + fed)
    if queries is not None:
        out = out.take_along_dim(queries.unsqueeze(-1), 1)
    return out
''', "LayerNorm and GELU written out": '''
def forward(self, hidden, key_mask=None, queries=None):
    def normalise(x, norm):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias

    asking = hidden
    if queries is not None:
        asking = hidden[torch.arange(len(hidden))[:, None], queries]
    p = self.dropout.p
    middle = F.dropout(self.attention(asking, hidden, key_mask), p, self.training) + asking
    middle = normalise(middle, self.attention_norm)
    x = self.intermediate(middle)
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return normalise(middle + F.dropout(self.output(x), p, self.training), self.output_norm)
'''}, [
    ("pre-LayerNorm", "attended = self.attention(hidden, hidden, key_mask)",
     "read = self.attention_norm(hidden)\n    attended = self.attention(read, read, key_mask)",
     "self.attention_norm(hidden + attended)", "hidden + attended"),
    ("no residual around attention", "self.attention_norm(hidden + attended)",
     "self.attention_norm(attended)"),
    ("no residual around the feed-forward", "self.output_norm(middle + fed)",
     "self.output_norm(fed)"),
    ("the wrong residual", "self.output_norm(middle + fed)", "self.output_norm(hidden + fed)"),
    ("no dropout on attention", "self.dropout(attended)", "attended"),
    ("no dropout on the feed-forward", "self.dropout(fed)", "fed"),
    ("no dropout at all", "self.dropout(attended)", "attended", "self.dropout(fed)", "fed"),
    ("dropout after attention's sum", "self.dropout(attended)", "attended",
     "self.attention_norm(hidden + attended)",
     "self.attention_norm(self.dropout(hidden + attended))"),
    ("dropout after the feed-forward's sum", "self.dropout(fed)", "fed",
     "self.output_norm(middle + fed)", "self.output_norm(self.dropout(middle + fed))"),
    ("dropout in evaluation too", "self.dropout(fed)", "F.dropout(fed, self.dropout.p)"),
    ("attention's dropout probability", "self.dropout(fed)", "self.attention.dropout(fed)"),
    ("the same norm twice", "self.output_norm", "self.attention_norm"),
    ("a ReLU", "F.gelu(", "F.relu("),
    ("the tanh approximation", "F.gelu(self.intermediate(middle))",
     "F.gelu(self.intermediate(middle), approximate='tanh')"),
    ("the key mask is lost", "self.attention(hidden, hidden, key_mask)",
     "self.attention(hidden, hidden)"),
    ("queries are ignored", "if queries is not None", "if False"),
    ("no last norm", "self.output_norm(middle + fed)", "middle + fed"),
    ("the residual without a gradient", "self.output_norm(middle + fed)",
     "self.output_norm(middle.detach() + fed)"),
])

# --- 5: the masked-LM head ------------------------------------------------------------------------

SOLUTIONS[5] = Solutions({"every hidden state, then the chosen ones": '''
class MaskedLMHead:
    def forward(self, hidden, word_embeddings):
        x = F.gelu(self.dense(hidden))
        x = self.norm(x)
        return x @ word_embeddings.T + self.bias


class BertForMaskedLM:
    def encode(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None,
               positions=None):
        hidden = self.bert(input_ids, attention_mask, token_type_ids, inputs_embeds)
        if positions is None:
            return hidden
        columns, chosen = positions
        columns = columns.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, columns).reshape(-1, hidden.shape[-1])[chosen]
''', "the last block on the chosen columns": '''
class MaskedLMHead:
    def forward(self, hidden, word_embeddings):
        hidden = self.dense(hidden)
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return torch.einsum("...h,vh->...v", self.norm(hidden), word_embeddings) + self.bias


class BertForMaskedLM:
    def encode(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None,
               positions=None):
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        given |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if positions is None:
            return self.bert(**given)
        rows = self.bert(**given, queries=positions[0])
        return torch.index_select(rows.flatten(0, 1), 0, positions[1])
'''}, [
    ("no bias", " + self.bias", ""),
    ("norm before the activation", "F.gelu(self.dense(hidden))", "self.norm(self.dense(hidden))",
     "x = self.norm(x)", "x = F.gelu(x)"),
    ("no norm", "x = self.norm(x)", "pass"),
    ("a ReLU", "F.gelu", "F.relu"),
    ("the tanh approximation", "F.gelu(self.dense(hidden))",
     "F.gelu(self.dense(hidden), approximate='tanh')"),
    ("no activation", "F.gelu(self.dense(hidden))", "self.dense(hidden)"),
    ("no dense layer", "F.gelu(self.dense(hidden))", "F.gelu(hidden)"),
    ("a decoder of its own", "x @ word_embeddings.T",
     "x @ torch.ones_like(word_embeddings).T"),
    ("column by column", ".reshape(-1, hidden.shape[-1])[chosen]",
     ".transpose(0, 1).reshape(-1, hidden.shape[-1])[chosen.sort().values]"),
    ("positions are ignored", "if positions is None", "if True"),
    ("the first columns only", "hidden.gather(1, columns)", "hidden[:, :columns.shape[1]]"),
    ("the attention mask is lost", "self.bert(input_ids, attention_mask,",
     "self.bert(input_ids, None,"),
    ("token types are lost", "token_type_ids, inputs_embeds)\n", "None, inputs_embeds)\n"),
    ("inputs_embeds are lost", "token_type_ids, inputs_embeds)\n", "token_type_ids)\n"),
    ("fillers are kept", ".reshape(-1, hidden.shape[-1])[chosen]",
     ".reshape(-1, hidden.shape[-1])"),
    ("the decoder is detached", "word_embeddings.T", "word_embeddings.detach().T"),
    ("the encoder is detached", "token_type_ids, inputs_embeds)\n",
     "token_type_ids, inputs_embeds).detach()\n"),
    ("divided by the root of H", "x @ word_embeddings.T",
     "x @ word_embeddings.T / x.shape[-1] ** 0.5"),
])

# --- 6: whole-word masking ------------------------------------------------------------------------

SOLUTIONS[6] = Solutions({"a loop over words": '''
def whole_word_mask(maskable, continuation, rate, generator=None):
    mask = torch.zeros_like(maskable)
    for row in range(len(maskable)):
        words = []
        for i in range(maskable.shape[1]):
            if not maskable[row, i]:
                continue
            joins = continuation[row, i] and i > 0 and maskable[row, i - 1]
            if joins:
                words[-1].append(i)
            else:
                words.append([i])
        wanted = rate * len(words)
        up = torch.rand(1, generator=generator).item() < wanted - int(wanted)
        order = torch.randperm(len(words), generator=generator).tolist()
        for word in order[:int(wanted) + up]:
            mask[row, words[word]] = True
    return mask
''', "numbers of words": '''
def whole_word_mask(maskable, continuation, rate, generator=None):
    left = torch.roll(maskable, 1, 1)
    left[:, 0] = False
    first = maskable & ~(continuation & left)
    number = first.long().cumsum(1)
    count = first.sum(1)
    score = torch.rand(maskable.shape, generator=generator)
    score = score.masked_fill(torch.arange(score.shape[1]) >= count[:, None], 2)
    wanted = rate * count
    k = (wanted + torch.rand(wanted.shape, generator=generator)).floor()
    rank = score.argsort(1).argsort(1)
    chosen = rank < k[:, None]
    return chosen.gather(1, (number - 1).clamp(min=0)) & maskable
''', "numbers of other types": '''
def whole_word_mask(maskable, continuation, rate, generator=None):
    import numpy as np
    rows = []
    for there, joins in zip(maskable.numpy(), continuation.numpy()):
        begins = there & ~(joins & np.insert(there, 0, False)[:-1])
        words = begins.sum()
        wanted = rate * words + float(torch.rand((), generator=generator))
        drawn = torch.randperm(int(words), generator=generator).numpy()[:int(wanted)]
        rows.append(np.isin(begins.cumsum() - 1, drawn) & there)
    return np.array(rows).astype(np.int8)
'''}, [
    ("a coin for each word",
     "up = torch.rand(1, generator=generator).item() < wanted - int(wanted)",
     "up, wanted = 0, sum(torch.rand(len(words), generator=generator) < rate)"),
    ("the first piece only", "mask[row, words[word]] = True", "mask[row, words[word][0]] = True"),
    ("single pieces", "words[-1].append(i)", "words.append([i])"),
    ("a budget of pieces, whatever fits", "for word in order[:int(wanted) + up]:\n            mask",
     "for word in order:\n            if mask[row].sum() + len(words[word]) <= rate * "
     "maskable[row].sum():\n              mask"),
    ("a budget of pieces, overshot", "for word in order[:int(wanted) + up]:\n            mask",
     "for word in order:\n            if mask[row].sum() < rate * maskable[row].sum():\n"
     "              mask"),
    ("at least one word", "order[:int(wanted) + up]", "order[:max(1, int(wanted) + up)]"),
    ("rounds to the nearest", "order[:int(wanted) + up]", "order[:round(wanted)]"),
    ("rounds down", "order[:int(wanted) + up]", "order[:int(wanted)]"),
    ("rounds up", "order[:int(wanted) + up]", "order[:int(wanted) + 1]"),
    ("long words first", "order[:int(wanted) + up]",
     "sorted(order, key=lambda w: -len(words[w]))[:int(wanted) + up]"),
    ("a word for each piece drawn", "torch.randperm(len(words), generator=generator).tolist()",
     "list(dict.fromkeys(w for i in torch.randperm(10, generator=generator).tolist() "
     "for w, word in enumerate(words) if i in word))"),
    ("the rate of the pieces as a number of words", "rate * len(words)",
     "rate * int(maskable[row].sum())"),
    ("glued over a special token", " and maskable[row, i - 1]", " and words"),
    ("the generator is ignored", "torch.randperm(len(words), generator=generator)",
     "torch.randperm(len(words))"),
    ("the first words", "torch.randperm(len(words), generator=generator)",
     "torch.arange(len(words))"),
])

# --- 7: entropy -----------------------------------------------------------------------------------

SOLUTIONS[7] = Solutions({"log-softmax": '''
def token_entropy(logits):
    log_p = F.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * log_p, torch.zeros_like(p))
    return -terms.sum(dim=-1)
''', "the logarithm of the sum": '''
def token_entropy(logits):
    z = logits.double()
    z = z - z.max(-1, keepdim=True).values
    weights = z.exp()
    total = weights.sum(-1)
    mean = (weights * z.clamp(min=-1e4)).sum(-1) / total
    return (total.log() - mean).float()
''', "float64, and a variable with the name of a library": '''
def token_entropy(logits):
    distributions = torch.softmax(logits.double(), -1)
    return -(distributions * distributions.clamp(min=1e-300).log()).sum(-1)
'''}, [
    ("bits", "return -terms.sum(dim=-1)", "return -terms.sum(dim=-1) / math.log(2)"),
    ("the sign", "return -terms", "return terms"),
    ("a mean", ".sum(dim=-1)", ".mean(dim=-1)"),
    ("softmax over the rows", "dim=-1)\n    p", "dim=0)\n    p"),
    ("0 times minus infinity", "torch.where(p > 0, p * log_p, torch.zeros_like(p))", "p * log_p"),
    ("a large epsilon", "torch.where(p > 0, p * log_p, torch.zeros_like(p))",
     "p * (p + 1e-3).log()"),
    ("overflow", "F.log_softmax(logits.float(), dim=-1)",
     "(logits.float().exp() / logits.float().exp().sum(-1, keepdim=True)).log()"),
    ("half precision", "logits.float()", "logits"),
    ("one minus the highest probability", "return -terms.sum(dim=-1)",
     "return 1 - p.max(-1).values"),
    ("the cross-entropy of the best word", "return -terms.sum(dim=-1)",
     "return -log_p.max(-1).values"),
    ("a small epsilon", "torch.where(p > 0, p * log_p, torch.zeros_like(p))",
     "p * (p + 1e-4).log()"),
])

# --- 8: the five selections -----------------------------------------------------------------------

SOLUTIONS[8] = Solutions({"row by row": '''
def select_positions(scores, maskable, k, select, generator=None):
    mask = torch.zeros_like(maskable)
    for row in range(len(scores)):
        there = maskable[row].nonzero()[:, 0]
        n = min(int(k[row]), len(there))
        values = scores[row, there].double()
        order = values.argsort(descending=True)
        if select == "high":
            chosen = order[:n]
        elif select == "low":
            chosen = order.flip(0)[:n]
        elif select == "middle":
            off = (values - (values.quantile(0.5) if len(values) else 0)).abs()
            chosen = off.argsort()[:n]
        elif select == "mixed":
            rest = order[n // 2:]
            anyone = rest[torch.randperm(len(rest), generator=generator)[:n - n // 2]]
            chosen = torch.cat([order[:n // 2], anyone])
        elif select == "sample":
            chosen = []
            left = values.clamp(min=1e-12)
            for _ in range(n):
                one = torch.multinomial(left, 1, generator=generator)
                chosen.append(one)
                left[one] = 0
            chosen = torch.cat(chosen) if chosen else order[:0]
        else:
            raise ValueError(f"select is {select}")
        mask[row, there[chosen]] = True
    return mask
''', "exponential races": '''
def select_positions(scores, maskable, k, select, generator=None):
    scores = scores.float()
    if select == "high":
        return top_k(scores, maskable, k)
    elif select == "low":
        return top_k(scores.max() - scores, maskable, k)
    if select == "middle":
        middle = scores.masked_fill(~maskable, torch.nan).nanquantile(0.5, 1, keepdim=True)
        return top_k(-(scores - middle).square(), maskable, k)
    noise = torch.rand(scores.shape, generator=generator)
    if select == "mixed":
        first = top_k(scores, maskable, k - k // 2)
        return first | top_k(noise.masked_fill(first, -1), maskable & ~first, k // 2)
    if select == "sample":
        clocks = -torch.log1p(-noise.clamp(min=1e-7)) / (scores + 1e-12)
        return top_k(-clocks, maskable, k)
    raise ValueError(select)
''', "numbers of other types": '''
def select_positions(scores, maskable, k, select, generator=None):
    noise = torch.rand(scores.shape, generator=generator).double()
    scores, half = scores.double(), torch.zeros_like(k)
    if select not in ("high", "low", "middle", "mixed", "sample"):
        raise ValueError(select)
    if select == "mixed":
        half = k // 2
    rows = [row[there] for row, there in zip(scores, maskable)]
    medians = torch.stack([row.quantile(0.5) if len(row) else row.sum() for row in rows])
    keys = {"high": scores, "low": -scores, "mixed": noise,
            "middle": -(scores - medians[:, None]).abs(),
            "sample": noise.clamp(min=1e-9).log() / scores.clamp(min=1e-12)}[select]

    def ranks(x):
        return x.masked_fill(~maskable, -torch.inf).argsort(1, descending=True).argsort(1)

    keys = torch.where(ranks(scores) < half[:, None], torch.inf, keys)
    return ((ranks(keys) < k[:, None]) * maskable).T.contiguous().T.float()
'''}, [
    ("high and low exchanged", "order[:n]\n        elif select == \"low\":\n            chosen = "
     "order.flip(0)[:n]",
     "order.flip(0)[:n]\n        elif select == \"low\":\n            chosen = "
     "order[:n]"),
    ("low ignores low", "order.flip(0)[:n]", "order[:n]"),
    ("special tokens may be chosen", "maskable[row].nonzero()",
     "torch.ones_like(maskable[row]).nonzero()"),
    ("the middle by a mean", "values.quantile(0.5)", "values.mean()"),
    ("the middle of all positions", "values.quantile(0.5)", "scores[row].double().quantile(0.5)"),
    ("mixed is high", "rest[torch.randperm(len(rest), generator=generator)[:n - n // 2]]",
     "rest[:n - n // 2]"),
    ("mixed draws from everyone", "rest = order[n // 2:]", "rest = order"),
    ("mixed is all random", "rest = order[n // 2:]", "rest = order", "[:n - n // 2]", "[:n]",
     "torch.cat([order[:n // 2], anyone])", "anyone"),
    ("mixed loses an odd one", "n - n // 2", "n // 2"),
    ("mixed takes half of the lowest", "[order[:n // 2], anyone]",
     "[order.flip(0)[:n // 2], anyone]"),
    ("mixed ignores its generator", "torch.randperm(len(rest), generator=generator)",
     "torch.randperm(len(rest))"),
    ("sample is uniform", "left = values.clamp(min=1e-12)", "left = torch.ones_like(values)"),
    ("sample in proportion to exp H", "left = values.clamp(min=1e-12)", "left = values.exp()"),
    ("sample in proportion to H squared", "left = values.clamp(min=1e-12)",
     "left = values.square().clamp(min=1e-12)"),
    ("sample in proportion in its first draw alone", "left[one] = 0",
     "left = (left > 0).double().index_fill(0, torch.cat(chosen), 0)"),
    ("sample with replacement", "left[one] = 0", "pass"),
    ("sample of H times noise", "one = torch.multinomial(left, 1, generator=generator)",
     "one = (left * torch.rand(len(left), generator=generator).double()).argmax()[None]"),
    ("sample ignores its generator", "torch.multinomial(left, 1, generator=generator)",
     "torch.multinomial(left, 1)"),
    ("sample fails at entropies of zero", "values.clamp(min=1e-12)", "values.clone()"),
    ("an unknown selection is high", "raise ValueError(f\"select is {select}\")",
     "chosen = order[:n]"),
])

# --- 9: masked entropy ----------------------------------------------------------------------------

SOLUTIONS[9] = Solutions({"a permutation of each row": '''
def masked_entropy(model, batch, rate, mask_token_id, generator=None):
    groups = math.ceil(1 / rate)
    group = torch.full_like(batch.input_ids, -1)
    for row, maskable in enumerate(batch.maskable):
        there = maskable.nonzero()[:, 0]
        deal = torch.arange(len(there)) % groups
        group[row, there] = deal[torch.randperm(len(there), generator=generator)]
    entropy = torch.zeros(group.shape)
    for number in range(groups):
        hidden = group == number
        ids = torch.where(hidden, mask_token_id, batch.input_ids)
        found = position_entropy(model, batch, ids, hidden)
        entropy[hidden] = found[hidden]
    return entropy
''', "all passes in one": '''
def masked_entropy(model, batch, rate, mask_token_id, generator=None):
    groups = math.ceil(1 / rate)
    noise = torch.rand(batch.maskable.shape, generator=generator) - 2 * batch.maskable.float()
    rank = noise.argsort(1).argsort(1)
    hidden = torch.stack([(rank % groups == g) & batch.maskable for g in range(groups)])
    ids = batch.input_ids.expand(groups, -1, -1).masked_fill(hidden, mask_token_id)
    mask = None if batch.attention_mask is None else batch.attention_mask.repeat(groups, 1)
    with evaluating(model):
        logits = model(ids.flatten(0, 1), mask)
    return (token_entropy(logits).unflatten(0, (groups, -1)) * hidden).sum(0)
''', "float64, not contiguous": '''
def masked_entropy(model, batch, rate, mask_token_id, generator=None):
    groups = -int(-1 // rate)
    draws = torch.rand(batch.maskable.shape, generator=generator) + 2 * ~batch.maskable
    group = draws.argsort(1).argsort(1).remainder(groups)
    entropy = torch.zeros(group.T.shape, dtype=torch.double).T
    for number in range(groups):
        chosen = (group == number).logical_and(batch.maskable)
        ids = batch.input_ids.clone()
        ids[chosen] = mask_token_id
        entropy += position_entropy(model, batch, ids, chosen).double()
    return entropy
'''}, [
    ("the same groups for ever", "deal[torch.randperm(len(there), generator=generator)]", "deal"),
    ("blocks of neighbours", "deal[torch.randperm(len(there), generator=generator)]",
     "deal.sort().values.roll(int(torch.randint(99, (1,), generator=generator)))"),
    ("the generator is ignored", "torch.randperm(len(there), generator=generator)",
     "torch.randperm(len(there))"),
    ("a new draw of groups in every pass", "for number in range(groups):",
     "for number in range(groups):\n        order = torch.rand(group.shape, generator=generator)\n"
     "        rank = order.masked_fill(~batch.maskable, 2).argsort(1).argsort(1)\n"
     "        group = torch.where(batch.maskable, rank % groups, -1)"),
    ("one group too few", "math.ceil(1 / rate)", "int(1 / rate)"),
    ("a group for each position", "math.ceil(1 / rate)", "batch.maskable.shape[1]"),
    ("groups of unequal size", "deal[torch.randperm(len(there), generator=generator)]",
     "torch.randint(groups, (len(there),), generator=generator)"),
    ("nothing is hidden", "torch.where(hidden, mask_token_id, batch.input_ids)", "batch.input_ids"),
    ("what was hidden stays hidden", "ids = torch.where(hidden, ",
     "ids = torch.where((group >= 0) & "
     "(group <= number), "),
    ("all but the group is hidden", "ids = torch.where(hidden, ",
     "ids = torch.where((group >= 0) & ~hidden, "),
    ("special tokens too", "enumerate(batch.maskable)", "enumerate(batch.maskable | True)"),
    ("padding is read", "position_entropy(model, batch, ids, hidden)",
     "position_entropy(model, Batch(ids, hidden, batch.index), ids, hidden)"),
    ("dropout is on, and the mode lost", "position_entropy(model, batch, ids, hidden)",
     "token_entropy(model.train()(ids, batch.attention_mask)).detach()"),
    ("every pass counts everywhere", "entropy[hidden] = found[hidden]",
     "entropy += position_entropy(model, batch, ids, batch.maskable)"),
    ("the last group is left out", "range(groups)", "range(groups - 1)"),
])

# --- 10: self-entropy -----------------------------------------------------------------------------

SOLUTIONS[10] = Solutions({"row by row": '''
class SelfEntropy:
    def mask(self, batch, generator=None):
        context = self.context
        k = budget(batch.maskable, context.rate, generator)
        candidates = batch.maskable
        ids = batch.input_ids.clone()
        if context.entropy_input == "masked":
            candidates = torch.zeros_like(batch.maskable)
            for row in range(len(k)):
                there = batch.maskable[row].nonzero()[:, 0]
                order = torch.randperm(len(there), generator=generator)
                candidates[row, there[order[:2 * k[row]]]] = True
            ids[candidates] = context.mask_token_id
        entropy = position_entropy(context.model, batch, ids, candidates)
        return select_positions(entropy, candidates, k, self.select, generator)
''', "all logits": '''
class SelfEntropy:
    def mask(self, batch, generator=None):
        c = self.context
        maskable = batch.maskable
        k = budget(maskable, c.rate, generator)
        ids, among = batch.input_ids, maskable
        if c.entropy_input != "visible":
            noise = torch.rand(maskable.shape, generator=generator)
            among = top_k(noise, maskable, k + k)
            ids = torch.where(among, c.mask_token_id, ids)
        with evaluating(c.model):
            logits = c.model(ids, batch.attention_mask, batch.token_type_ids)
        return select_positions(token_entropy(logits), among, k, self.select, generator)
'''}, [
    ("as many candidates as are wanted", "order[:2 * k[row]]", "order[:k[row]]"),
    ("three times as many", "order[:2 * k[row]]", "order[:3 * k[row]]"),
    ("every position is a candidate", "order[:2 * k[row]]", "order"),
    ("candidates are visible", "ids[candidates] = context.mask_token_id", "pass"),
    ("all candidates are masked in the end",
     "select_positions(entropy, candidates, k, self.select, generator)", "candidates"),
    ("chosen among all positions", "select_positions(entropy, candidates, k,",
     "select_positions(entropy, batch.maskable, k + 1,"),
    ("the least uncertain", "select_positions(entropy, ", "select_positions(-entropy, "),
    ("always high", "self.select", "'high'"),
    ("the generator is ignored", "torch.randperm(len(there), generator=generator)",
     "torch.randperm(len(there))"),
    ("the first positions are candidates", "torch.randperm(len(there), generator=generator)",
     "torch.arange(len(there))"),
    ("special tokens are candidates", "batch.maskable[row].nonzero()",
     "(batch.maskable[row] | True).nonzero()"),
    ("in place", "batch.input_ids.clone()", "batch.input_ids"),
    ("dropout is on", "position_entropy(context.model, batch, ids, candidates)",
     "token_entropy(context.model.train()(ids, batch.attention_mask)).detach()"),
    ("the model is left in evaluation mode",
     "position_entropy(context.model, batch, ids, candidates)",
     "token_entropy(context.model.eval()(ids, batch.attention_mask)).detach()"),
    ("gradients are kept", "position_entropy(context.model, batch, ids, candidates)",
     "token_entropy(context.model(ids, batch.attention_mask)); entropy.sum().backward()"),
    ("padding is read", "position_entropy(context.model, batch, ids,",
     "position_entropy(context.model, Batch(ids, candidates, batch.index), ids,"),
    ("visible is forgotten", 'if context.entropy_input == "masked":', "if True:"),
    ("at least one a row", "budget(batch.maskable, context.rate, generator)",
     "budget(batch.maskable, context.rate, generator).clamp(min=1)"),
    ("candidates at twice the rate",
     "            candidates = torch.zeros_like(batch.maskable)\n"
     "            for row in range(len(k)):\n"
     "                there = batch.maskable[row].nonzero()[:, 0]\n"
     "                order = torch.randperm(len(there), generator=generator)\n"
     "                candidates[row, there[order[:2 * k[row]]]] = True\n",
     "            candidates = random_mask(batch.maskable, 2 * context.rate, generator)\n"),
])

# --- 11: the KD loss ------------------------------------------------------------------------------

SOLUTIONS[11] = Solutions({"the formula": '''
def kd_loss(student_logits, teacher_logits, labels, alpha, temperature):
    z_s = student_logits.float()
    ce = F.cross_entropy(z_s, labels)
    if alpha == 0:
        return ce
    z_t = teacher_logits.float()
    log_s = torch.log_softmax(z_s / temperature, -1)
    log_t = torch.log_softmax(z_t / temperature, -1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    return alpha * temperature ** 2 * kl + (1 - alpha) * ce
''', "cross-entropy with soft targets": '''
def kd_loss(student_logits, teacher_logits, labels, alpha, temperature):
    z_s, T = student_logits.double(), temperature
    hard = (z_s.logsumexp(-1) - z_s[range(len(labels)), labels]).mean()
    if not alpha:
        return hard.float()
    z_t = teacher_logits.double()
    p = (z_t / T).softmax(-1)
    soft = F.cross_entropy(z_s / T, p) - torch.special.entr(p).sum(-1).mean()
    return (alpha * T * T * soft + hard - alpha * hard).float()
''', "float64, and a variable with the name of a library call": '''
def kd_loss(student_logits, teacher_logits, labels, alpha, temperature):
    z_s = student_logits.double()
    ce = -z_s.log_softmax(-1).gather(1, labels[:, None]).mean()
    kl_div = 0
    if alpha > 0:
        z_t = teacher_logits.double() / temperature
        log_p = z_t - z_t.logsumexp(-1, keepdim=True)
        log_q = (z_s / temperature).log_softmax(-1)
        kl_div = torch.einsum("nv,nv->n", log_p.exp(), log_p - log_q).mean()
    return alpha * temperature ** 2 * kl_div + (1 - alpha) * ce
'''}, [
    ("no T squared", "alpha * temperature ** 2 * kl", "alpha * kl"),
    ("T, not T squared", "temperature ** 2", "temperature"),
    ("student first", "(log_t.exp() * (log_t - log_s))", "(log_s.exp() * (log_s - log_t))"),
    ("temperature of the teacher alone", "z_s / temperature", "z_s"),
    ("temperature of the student alone", "z_t / temperature", "z_t"),
    ("no temperature", "/ temperature", ""),
    ("alpha exchanged", "alpha * temperature ** 2 * kl + (1 - alpha) * ce",
     "(1 - alpha) * temperature ** 2 * kl + alpha * ce"),
    ("no weight on the labels", "(1 - alpha) * ce", "ce"),
    ("a mean over words too", ".sum(-1).mean()", ".mean()"),
    ("a sum over positions", ".sum(-1).mean()", ".sum()"),
    ("kl_div with its arguments exchanged", "(log_t.exp() * (log_t - log_s)).sum(-1).mean()",
     "F.kl_div(log_t, log_s, reduction='batchmean', log_target=True)"),
    ("cross-entropy of softened logits", "F.cross_entropy(z_s, labels)",
     "F.cross_entropy(z_s / temperature, labels)"),
    ("the soft targets' cross-entropy", "(log_t.exp() * (log_t - log_s))",
     "(-log_t.exp() * log_s)"),
    ("overflow", "torch.log_softmax(z_s / temperature, -1)",
     "((z_s / temperature).exp() / (z_s / temperature).exp().sum(-1, keepdim=True)).log()"),
    ("underflow", "torch.log_softmax(z_s / temperature, -1)",
     "torch.softmax(z_s / temperature, -1).log()"),
    ("half precision", ".float()", ""),
    ("the teacher is always needed", "if alpha == 0:", "if teacher_logits is ...:"),
    ("the student's logits are detached", "torch.log_softmax(z_s / temperature, -1)",
     "torch.log_softmax(z_s.detach() / temperature, -1)"),
])

# --- 12: embedding saliency -----------------------------------------------------------------------

SOLUTIONS[12] = Solutions({"indexing": '''
def embedding_saliency(embedding_grad, embedding_weight, token_ids):
    grad = embedding_grad.float()
    weight = embedding_weight.detach().float()
    vectors = weight[token_ids]
    return (grad * vectors).sum(-1)
''', "a matrix product a token": '''
@torch.no_grad()
def embedding_saliency(embedding_grad, embedding_weight, token_ids):
    vectors = torch.index_select(embedding_weight, 0, token_ids.flatten()).double()
    grad = embedding_grad.double().reshape(-1, 1, vectors.shape[-1])
    return torch.bmm(grad, vectors[..., None]).reshape(token_ids.shape).float()
''', "einsum": '''
def embedding_saliency(embedding_grad, embedding_weight, token_ids):
    rows = F.embedding(token_ids, embedding_weight).detach().float()
    return torch.einsum("blh,blh->bl", embedding_grad.float(), rows)
'''}, [
    ("not detached", ".detach()", ""),
    ("half precision", ".float()", ""),
    ("the gradient in half precision", "embedding_grad.float()", "embedding_grad",
     "embedding_weight.detach().float()", "embedding_weight.detach().to(grad.dtype)"),
    ("the sign turned", "return (grad", "return -(grad"),
    ("the absolute value", "(grad * vectors).sum(-1)", "(grad * vectors).sum(-1).abs()"),
    ("a mean", ".sum(-1)", ".mean(-1)"),
    ("the gradient's norm", "(grad * vectors).sum(-1)", "grad.norm(dim=-1)"),
    ("a cosine", "(grad * vectors).sum(-1)", "F.cosine_similarity(grad, vectors, dim=-1)"),
    ("a sum over the text", ".sum(-1)", ".sum(1)"),
    ("the whole vocabulary", "(grad * vectors).sum(-1)",
     "(grad @ weight.T).gather(2, token_ids[..., None])[..., 0]"),
    ("a one-hot tensor", "weight[token_ids]", "F.one_hot(token_ids, len(weight)).float() @ weight"),
    ("positions, not tokens", "weight[token_ids]",
     "weight[torch.arange(token_ids.shape[1]).expand_as(token_ids)]"),
])

# --- 13: Typhoon's average ------------------------------------------------------------------------

SOLUTIONS[13] = Solutions({"bincount": '''
class Typhoon:
    def accumulate(self, original_ids, dot, maskable, masked=None):
        V = len(self.weight)
        if masked is None:
            masked = torch.zeros_like(maskable)
        for part, there, sign in ((0, ~masked, -1), (1, masked, 1)):
            ids = original_ids[there & maskable]
            value = sign * dot[there & maskable]
            columns = slice(part * V, part * V + V)
            self.totals[0, columns] += torch.bincount(ids, value.double(), minlength=V)
            self.totals[1, columns] += torch.bincount(ids, minlength=V)

    def step(self, reduce=None):
        if reduce:
            reduce(self.totals)
        V = len(self.weight)
        mean = self.totals[0] / self.totals[1].clamp(min=1)
        s = mean[:V] + mean[V:]
        count = self.totals[1, :V] + self.totals[1, V:]
        old = count > 0
        first = old & ~self.seen
        again = old & self.seen
        beta = self.ema_weight
        self.weight[again] = (1 - beta) * self.weight[again] + beta * s[again]
        self.weight[first] = s[first]
        self.seen |= old
        self.totals.zero_()
''', "loops": '''
class Typhoon:
    def accumulate(self, original_ids, dot, maskable, masked=None):
        V = len(self.weight)
        for b in range(len(original_ids)):
            for i in range(original_ids.shape[1]):
                if not maskable[b, i]:
                    continue
                v = int(original_ids[b, i])
                if masked is not None and masked[b, i]:
                    self.totals[0, V + v] += dot[b, i]
                    self.totals[1, V + v] += 1
                else:
                    self.totals[0, v] -= dot[b, i]
                    self.totals[1, v] += 1

    def step(self, reduce=None):
        sums, counts = self.totals
        if reduce is not None:
            reduce(sums)
            reduce(counts)
        V, seen = len(self.weight), self.seen.clone()
        for v in range(V):
            if counts[v] + counts[V + v] == 0:
                continue
            s = sum(float(sums[i] / counts[i]) for i in (v, V + v) if counts[i])
            old = float(self.weight[v])
            self.weight[v] = old + self.ema_weight * (s - old) if seen[v] else s
            self.seen[v] = True
        self.totals = torch.zeros_like(self.totals)
'''}, [
    ("visible tokens with the masked sign", "~masked, -1", "~masked, 1"),
    ("masked tokens with the visible sign", "masked, 1)", "masked, -1)"),
    ("signs exchanged", "~masked, -1), (1, masked, 1)", "~masked, 1), (1, masked, -1)"),
    ("one mean over both", "mean[:V] + mean[V:]",
     "(self.totals[0, :V] + self.totals[0, V:]) / (self.totals[1, :V] + self.totals[1, V:])"
     ".clamp(min=1)"),
    ("the mean of the two means", "mean[:V] + mean[V:]", "(mean[:V] + mean[V:]) / 2"),
    ("sums, not means", "self.totals[0] / self.totals[1].clamp(min=1)", "self.totals[0]"),
    ("the weight of the old value", "beta = self.ema_weight", "beta = 1 - self.ema_weight"),
    ("the first value does not set it", "self.weight[first] = s[first]",
     "self.weight[first] = beta * s[first]"),
    ("no memory", "(1 - beta) * self.weight[again] + beta * s[again]", "s[again]"),
    ("types that are not there decay", "again = old & self.seen", "again = self.seen.clone()"),
    ("padding counts", "there & maskable", "there"),
    ("the sums are not cleared", "self.totals.zero_()", "pass"),
    ("the last batch alone", "self.totals[0, columns] +=", "self.totals[0, columns] =",
     "self.totals[1, columns] +=", "self.totals[1, columns] ="),
    ("nothing is ever seen", "self.seen |= old", "pass"),
    ("everything is seen", "self.seen |= old", "self.seen[:] = True"),
    ("ranks are not reduced", "if reduce:", "if False:"),
    ("ranks are reduced after the means", "reduce(self.totals)", "pass",
     "s = mean[:V] + mean[V:]\n",
     "s = mean[:V] + mean[V:]\n        if reduce:\n            reduce(s)\n"),
    ("without a mask everything is masked", "torch.zeros_like(maskable)",
     "torch.ones_like(maskable)"),
])

# --- 14: Typhoon's rates --------------------------------------------------------------------------

SOLUTIONS[14] = Solutions({"bisection": '''
class Typhoon:
    def rates(self):
        scaled = torch.ones_like(self.weight)
        known = self.weight[self.seen]
        if len(known) and known.max() > known.min():
            scaled[self.seen] = (known - known.min()) / (known.max() - known.min())
        u = 1 - self.spread + self.spread * scaled
        low, high = 0.0, 1.0
        while (self.frequency * (high * u).clamp(max=1)).sum() < self.rate:
            high = high * 2
        for _ in range(100):
            c = (low + high) / 2
            if (self.frequency * (c * u).clamp(max=1)).sum() < self.rate:
                low = c
            else:
                high = c
        return (high * u).clamp(max=1)
''', "capping until none is above 1": '''
class Typhoon:
    def rates(self):
        scaled = torch.ones_like(self.weight)
        known = self.weight[self.seen]
        if len(known) and known.max() > known.min():
            scaled[self.seen] = (known - known.min()) / (known.max() - known.min())
        u = 1 - self.spread + self.spread * scaled
        f = self.frequency
        capped = torch.zeros_like(self.seen)
        while True:
            free = ~capped
            c = (self.rate - f[capped].sum()) / (f * u)[free].sum()
            over = free & (c * u > 1)
            if not over.any():
                return torch.where(capped, 1.0, (c * u).clamp(max=1))
            capped = capped | over
'''}, [
    ("unseen types count 0", "torch.ones_like(self.weight)", "torch.zeros_like(self.weight)"),
    ("scaled over all types", "self.weight[self.seen]\n", "self.weight\n",
     "scaled[self.seen] =", "scaled[:] ="),
    ("unseen types with a weight of 0", "known = self.weight[self.seen]", "known = self.weight",
     "scaled[self.seen] = (known", "scaled = (known"),
    ("scaled up to the highest of all types", "/ (known.max() - known.min())",
     "/ (self.weight.max() - known.min())"),
    ("nan with one type", "if len(known) and known.max() > known.min():", "if len(known):"),
    ("nan with equal weights", "if len(known) and known.max() > known.min():",
     "if len(known) > 1:"),
    ("spread turned around", "1 - self.spread + self.spread * scaled",
     "self.spread + (1 - self.spread) * scaled"),
    ("no floor", "1 - self.spread + self.spread * scaled", "self.spread * scaled + 1e-9"),
    ("the highest weight has the lowest rate", "self.spread * scaled",
     "self.spread * (1 - scaled)"),
    ("no cap", "return (high * u).clamp(max=1)",
     "return self.rate * u / (self.frequency * u).sum()"),
    ("what the cap cuts is lost", "return (high * u).clamp(max=1)",
     "return (self.rate * u / (self.frequency * u).sum()).clamp(max=1)"),
    ("given back once", "return (high * u).clamp(max=1)",
     "r = (self.rate * u / (self.frequency * u).sum()).clamp(max=1)\n        free = r < 1\n"
     "        f = self.frequency\n"
     "        share = (self.rate - f[~free].sum()) / (f * r)[free].sum()\n"
     "        return torch.where(free, r * share, r).clamp(max=1)"),
    ("given back evenly", "return (high * u).clamp(max=1)",
     "r = (self.rate * u / (self.frequency * u).sum()).clamp(max=1)\n        free = r < 1\n"
     "        f = self.frequency\n        missing = (self.rate - (f * r).sum()) / f[free].sum()\n"
     "        return torch.where(free, r + missing, r).clamp(max=1)"),
    ("a mean over types", "return (high * u).clamp(max=1)",
     "return (self.rate * u / u.mean()).clamp(max=1)"),
    ("the rate times u", "return (high * u).clamp(max=1)", "return self.rate * u"),
])

# --- 15: one training step ------------------------------------------------------------------------

SOLUTIONS[15] = Solutions({"step by step": '''
class Trainer:
    def micro_step(self, batch, mask, masked_in_all, kd_weight):
        vocab, recipe = self.texts.vocab, self.recipe
        corrupted, labels = corrupt(batch.input_ids, mask, vocab.mask_id, vocab.size,
                                    recipe.corruption, generator=self.generator,
                                    special_ids=vocab.special_ids)
        targets, queries = labels[mask], query_positions(mask)
        watching = self.strategy.wants_gradient
        attention_mask, types = batch.attention_mask, batch.token_type_ids
        with self.autocast():
            words = self.model.bert.embeddings.word_embeddings(corrupted)
            if watching:
                words.retain_grad()
            logits = self.parallel(inputs_embeds=words, attention_mask=attention_mask,
                                   token_type_ids=types, positions=queries)
            teacher_logits = None
            if kd_weight:
                with torch.no_grad():
                    teacher_logits = self.teacher(corrupted, attention_mask, types,
                                                  positions=queries)
            N = len(targets)
            loss = logits.sum()
            if N > 0:
                loss = N * kd_loss(logits, teacher_logits, targets, kd_weight,
                                   recipe.kd_temperature)
        scaled = loss / masked_in_all * world_size()
        scaled.backward()
        if watching:
            unseen = corrupted != batch.input_ids
            self.strategy.observe(batch, unseen, words.grad / world_size())
        return loss.detach()
''', "all logits and a detached teacher": '''
class Trainer:
    def micro_step(self, batch, mask, masked_in_all, kd_weight):
        T, alpha = self.recipe.kd_temperature, kd_weight
        corrupted, labels = corrupt(batch.input_ids, mask, self.texts.vocab.mask_id,
                                    self.texts.vocab.size, self.recipe.corruption,
                                    self.generator, list(self.texts.vocab.special_ids))
        given = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids}
        words = self.model.bert.embeddings.word_embeddings(corrupted)
        if self.strategy.wants_gradient:
            words.retain_grad()
        with self.autocast():
            logits = self.parallel(inputs_embeds=words, positions=query_positions(mask), **given)
            if alpha > 0:
                z_t = self.teacher(corrupted, **given)[mask].detach()
        logits = logits.float()
        loss = (1 - alpha) * F.cross_entropy(logits, labels[mask], reduction="sum")
        if alpha > 0:
            log_t, log_s = (F.log_softmax(z.float() / T, -1) for z in (z_t, logits))
            loss = loss + alpha * T ** 2 * (log_t.exp() * (log_t - log_s)).sum()
        (loss * (world_size() / masked_in_all)).backward()
        if self.strategy.wants_gradient:
            self.strategy.observe(batch, corrupted.ne(batch.input_ids), words.grad / world_size())
        return loss.detach()
'''}, [
    ("the teacher reads the uncorrupted text", "self.teacher(corrupted, ",
     "self.teacher(batch.input_ids, "),
    ("the temperature is forgotten", "recipe.kd_temperature", "1.0"),
    ("a fixed temperature", "recipe.kd_temperature", "2.0"),
    ("alpha is forgotten", "targets, kd_weight,", "targets, 0.0,"),
    ("alpha is forgotten where there is a teacher", "targets, kd_weight,",
     "targets, float(bool(kd_weight)),"),
    ("the recipe's weight", "targets, kd_weight,", "targets, recipe.kd_weight,",
     "if kd_weight:", "if recipe.kd_weight:"),
    ("the recipe's weight where there is a teacher", "targets, kd_weight,",
     "targets, recipe.kd_weight * bool(kd_weight),"),
    ("no attention mask", "attention_mask, types = batch.attention_mask, batch.token_type_ids",
     "attention_mask, types = None, batch.token_type_ids"),
    ("no attention mask for the teacher", "self.teacher(corrupted, attention_mask,",
     "self.teacher(corrupted, None,"),
    ("no token types", "attention_mask, types = batch.attention_mask, batch.token_type_ids",
     "attention_mask, types = batch.attention_mask, None"),
    ("no token types for the teacher", "self.teacher(corrupted, attention_mask, types,",
     "self.teacher(corrupted, attention_mask, None,"),
    ("no special ids", ",\n                                    special_ids=vocab.special_ids", ""),
    ("the recipe's corruption is forgotten", "recipe.corruption, ", ""),
    ("the generator is forgotten", "generator=self.generator", "generator=None"),
    ("no world size", " * world_size()", ""),
    ("observe is given the scaled gradient", "words.grad / world_size()", "words.grad"),
    ("no autocast", "with self.autocast():", "with contextlib.nullcontext():"),
    ("no autocast for the teacher", "with torch.no_grad():",
     "with torch.no_grad(), torch.autocast('cpu', enabled=False):"),
    ("the teacher has gradients", "with torch.no_grad():", "with contextlib.nullcontext():"),
    ("nothing masked is not guarded", "if N > 0:", "if True:"),
    ("nothing masked has no gradient", "loss = logits.sum()",
     "loss = torch.zeros((), requires_grad=True)"),
    ("the mean of the micro-batch", "loss / masked_in_all", "loss / max(N, 1)"),
    ("not divided", "loss / masked_in_all", "loss"),
    ("returns the mean", "return loss.detach()", "return loss.detach() / max(N, 1)"),
    ("returns the graph", "return loss.detach()", "return loss"),
    ("no backward pass", "scaled.backward()", "scaled.backward() if watching else None"),
    ("observe is given the mask", "unseen = corrupted != batch.input_ids", "unseen = mask"),
    ("observe is never called", "if watching:\n            unseen",
     "if False:\n            unseen"),
    ("the uncorrupted text goes in", "word_embeddings(corrupted)",
     "word_embeddings(batch.input_ids)"),
    ("labels are what the model reads", "= labels[mask]", "= corrupted[mask]"),
    ("the teacher always runs", "if kd_weight:", "if self.teacher:"),
    ("the model beside its parallel form", "self.parallel(", "self.model("),
])

# --- 16: Matthews' correlation --------------------------------------------------------------------

SOLUTIONS[16] = Solutions({"a confusion matrix": '''
def matthews(predictions, labels):
    classes = sorted(set(predictions.tolist()) | set(labels.tolist()))
    C = np.array([[np.sum((labels == t) & (predictions == p)) for p in classes] for t in classes])
    C = C.astype(float)
    n, right = C.sum(), np.trace(C)
    t, p = C.sum(1), C.sum(0)
    cross = right * n - t @ p
    truth = n ** 2 - t @ t
    said = n ** 2 - p @ p
    if truth * said == 0:
        return 0.0
    return float(cross / np.sqrt(said * truth))
''', "the covariance of one-hot matrices": '''
def matthews(predictions, labels):
    classes = np.unique(np.concatenate([predictions, labels]))
    x = (np.asarray(predictions)[:, None] == classes).astype(float)
    y = (np.asarray(labels)[:, None] == classes).astype(float)
    x, y = x - x.mean(0), y - y.mean(0)
    xx, yy = (x * x).sum(), (y * y).sum()
    return float((x * y).sum() / math.sqrt(xx * yy)) if xx > 1e-12 and yy > 1e-12 else 0.0
''', "a 0-d tensor": '''
def matthews(predictions, labels):
    x, y = (torch.as_tensor(side) for side in (predictions, labels))
    classes = torch.cat([x, y]).unique()
    x, y = ((side[:, None] == classes).double() for side in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    scale = ((x * x).sum() * (y * y).sum()).sqrt()
    return (x * y).sum() / scale if scale > 1e-9 else 0
'''}, [
    ("the labels' part twice", "np.sqrt(said * truth)", "np.sqrt(truth * truth)"),
    ("the predictions' part twice", "np.sqrt(said * truth)", "np.sqrt(said * said)"),
    ("no square root", "np.sqrt(said * truth)", "(said * truth)"),
    ("a mean of the two parts", "np.sqrt(said * truth)", "((said + truth) / 2)"),
    ("the sign", "cross /", "-cross /"),
    ("accuracy", "cross / np.sqrt(said * truth)", "right / n"),
    ("nan of a constant", "if truth * said == 0:", "if False:"),
    ("1 of a constant", "return 0.0", "return 1.0"),
    ("two classes only", "classes = sorted(set(predictions.tolist()) | set(labels.tolist()))",
     "classes = [0, 1]"),
    ("the classes of the labels alone", "sorted(set(predictions.tolist()) | set(labels.tolist()))",
     "sorted(set(labels.tolist()))"),
    ("a correlation of numbers", "if truth * said == 0:",
     "if truth * said:\n        return float(np.corrcoef(predictions, labels)[0, 1])\n"
     "    if truth * said == 0:"),
    ("the expected agreement is left out", "right * n - t @ p", "right * n"),
    ("nan of constant labels", "if truth * said == 0:", "if said == 0:"),
    ("nan of constant predictions", "if truth * said == 0:", "if truth == 0:"),
    ("products in int32", "np.sqrt(said * truth)", "np.sqrt(np.int32(said) * np.int32(truth))"),
    ("products in int64", "C.astype(float)", "C.astype(np.int64)", "np.sqrt(said * truth)",
     "np.sqrt(np.maximum(said * truth, 1))"),
])

# --- 17: the paired t test and its interval -------------------------------------------------------

SOLUTIONS[17] = Solutions({"numpy": '''
def paired_t_test(a, b):
    if len(a) != len(b):
        raise ValueError("a and b must have one score a seed")
    d = np.array(a, dtype=float) - np.array(b, dtype=float)
    n = len(d)
    mean, sd = mean_sd(d)
    if n == 1 or sd == 0:
        return float("nan"), float("nan")
    t = mean / (sd / n ** 0.5)
    p = t_tail(t, n - 1)
    return t, p


def confidence_interval(differences, level=LEVEL):
    n = len(differences)
    mean, sd = mean_sd(differences)
    if n == 1 or not sd:
        return float("nan"), float("nan")
    factor = t_critical(n - 1, 1 - level)
    width = factor * sd / n ** 0.5
    return mean - width, mean + width
''', "the standard library": '''
def paired_t_test(a, b):
    import statistics
    d = []
    for x, y in zip(a, b, strict=True):
        d.append(x - y)
    if len(d) < 2 or max(d) - min(d) <= 1e-9 * max(map(abs, d)):
        return math.nan, math.nan
    t = statistics.fmean(d) * math.sqrt(len(d)) / statistics.stdev(d)
    return t, t_tail(t, len(d) - 1)


def confidence_interval(differences, level=LEVEL):
    import statistics
    d = list(differences)
    if max(d) - min(d) <= 1e-9 * max(map(abs, d)):
        return math.nan, math.nan
    error = statistics.stdev(d) / math.sqrt(len(d))
    reach = t_critical(len(d) - 1, 1 - level) * error
    return statistics.fmean(d) - reach, statistics.fmean(d) + reach
''', "arrays and numpy's numbers": '''
def paired_t_test(a, b):
    if len(a) != len(b):
        raise ValueError("not paired")
    d = np.subtract(a, b)
    mean, sd = (np.float64(x) for x in mean_sd(d))
    if not sd > 0:
        return np.array([np.nan, np.nan])
    t = np.sqrt(len(d)) * mean / sd
    return t, np.float64(t_tail(t, len(d) - 1))


def confidence_interval(differences, level=LEVEL):
    mean, sd = mean_sd(differences)
    if not sd > 0:
        return np.full(2, np.nan)
    half = t_critical(len(differences) - 1, 1 - level) * sd / np.sqrt(len(differences))
    return mean + half * np.array([-1, 1])
'''}, [
    ("t loses its sign", "return t, p", "return abs(t), p"),
    ("b minus a", "np.array(a, dtype=float) - np.array(b, dtype=float)",
     "np.array(b, dtype=float) - np.array(a, dtype=float)"),
    ("the sd of a population", "t = mean / (sd", "sd = float(d.std())\n    t = mean / (sd"),
    ("n for its root", "(sd / n ** 0.5)", "(sd / n)"),
    ("no root of n", "(sd / n ** 0.5)", "sd"),
    ("unpaired", "t = mean / (sd / n ** 0.5)",
     "t = mean / ((np.var(a, ddof=1) + np.var(b, ddof=1)) / n) ** 0.5"),
    ("n degrees of freedom", "p = t_tail(t, n - 1)", "p = t_tail(t, n)"),
    ("one-sided", "p = t_tail(t, n - 1)", "p = t_tail(t, n - 1) / 2"),
    ("a normal distribution", "p = t_tail(t, n - 1)", "p = math.erfc(abs(t) / 2 ** 0.5)"),
    ("different lengths", "if len(a) != len(b):\n",
     "a, b = a[:len(b)], b[:len(a)]\n    if False:\n"),
    ("lengths that broadcast", "if len(a) != len(b):\n", "if False:\n"),
    ("p of 0 without a spread", 'if n == 1 or sd == 0:\n        return float("nan"), float("nan")',
     'if n == 1 or sd == 0:\n        return float("inf"), 0.0'),
    ("p of 1 where all are 0", "if n == 1 or sd == 0:",
     "if sd == 0 == mean:\n        return 0.0, 1.0\n    if n == 1 or sd == 0:"),
    ("rounding is a spread", "mean, sd = mean_sd(d)\n    if n == 1 or sd == 0:",
     "mean, sd = mean_sd(d)\n    sd = d.std(ddof=1) if n > 1 else sd\n    if n == 1 or sd == 0:"),
    ("one seed has a t", "if n == 1 or sd == 0:",
     "if n == 1:\n        return 0.0, 1.0\n    if sd == 0:"),
    ("an interval without width", "if n == 1 or not sd:", "if n == 1:"),
    ("an interval with 1.96", "t_critical(n - 1, 1 - level)", "1.96"),
    ("an interval of another level", "t_critical(n - 1, 1 - level)", "t_critical(n - 1, 0.05)"),
    ("an interval of half the error", "t_critical(n - 1, 1 - level)",
     "t_critical(n - 1, (1 - level) / 2)"),
    ("an interval without the root of n", "factor * sd / n ** 0.5", "factor * sd"),
    ("an interval of n degrees of freedom", "t_critical(n - 1, 1 - level)",
     "t_critical(n, 1 - level)"),
    ("half an interval", "mean - width, mean + width", "mean - width / 2, mean + width / 2"),
])

# --- 18: Holm -------------------------------------------------------------------------------------

SOLUTIONS[18] = Solutions({"sort and accumulate": '''
def holm(p_values):
    m = len(p_values)
    order = [i for i in range(m) if p_values[i] == p_values[i]]
    order.sort(key=lambda i: p_values[i])
    adjusted = [float("nan")] * m
    before = 0.0
    for rank, i in enumerate(order):
        factor = m - rank
        value = min(1.0, factor * p_values[i])
        value = max(value, before)
        adjusted[i] = before = value
    return adjusted
''', "the maximum over all smaller ones": '''
def holm(p_values):
    p = np.asarray(p_values, dtype=float)
    result = []
    for value in p:
        if np.isnan(value):
            result.append(math.nan)
            continue
        smaller = sorted(q for q in p if q <= value)
        result.append(float(max(min(1, q * (len(p) - k)) for k, q in enumerate(smaller))))
    return result
''', "an array": '''
def holm(p_values):
    p = np.array(p_values, dtype=float)
    order = np.argsort(p)
    steps = np.minimum(1, p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.fmax.accumulate(steps) if len(p) else steps
    return np.where(np.isnan(p), np.nan, adjusted)
''', "a list of numpy's numbers": '''
def holm(p_values):
    m = len(p_values)
    real = [p for p in p_values if not math.isnan(p)]
    return [np.float64(max(min(1, q * (m - sum(r < q for r in real))) for q in real if q <= p))
            if p in real else np.nan for p in p_values]
'''}, [
    ("Bonferroni", "factor = m - rank", "factor = m"),
    ("the factors off by one", "factor = m - rank", "factor = m - rank - 1"),
    ("the factors off by one, upwards", "factor = m - rank", "factor = m - rank + 1"),
    ("the factors turned around", "factor = m - rank", "factor = rank + 1"),
    ("no step down", "value = max(value, before)", "pass"),
    ("above 1", "min(1.0, factor * p_values[i])", "factor * p_values[i]"),
    ("Benjamini and Hochberg's factors", "factor = m - rank", "factor = m / (rank + 1)"),
    ("from the largest", "order.sort(key=lambda i: p_values[i])",
     "order.sort(key=lambda i: -p_values[i])"),
    ("in the order of the p-values", "return adjusted", "return sorted(adjusted)"),
    ("nan does not count", "m = len(p_values)", "m = sum(p == p for p in p_values)",
     '[float("nan")] * m', '[float("nan")] * len(p_values)', "for i in range(m)",
     "for i in range(len(p_values))"),
    ("nan counts as 0", "if p_values[i] == p_values[i]", ""),
    ("nan becomes 1", 'float("nan")', "1.0"),
    ("sorts its argument", "order = [i", "p_values.sort()\n    order = [i"),
])

# --- 19: the two-way bootstrap --------------------------------------------------------------------

SOLUTIONS[19] = Solutions({"one column after the other": '''
def resampled_scores(score, *columns, resamples, seed):
    rng = np.random.default_rng(seed)
    columns = [np.array(column) for column in columns]
    m = len(columns[0])
    scores = np.zeros(resamples)
    for r in range(resamples):
        rows = rng.integers(0, m, size=m)
        scores[r] = score(*[column[rows] for column in columns])
    return scores


def multi_bootstrap(a, b, level=LEVEL, seed=0):
    rng = np.random.default_rng(seed)
    n, R = a.shape
    if n == 1:
        return float("nan"), float("nan")
    seeds = rng.integers(0, n, size=(n, R))
    columns = np.arange(R)
    means = np.mean(a[seeds, columns] - b[seeds, columns], 0)
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))
''', "counts of a multinomial": '''
def resampled_scores(score, *columns, resamples, seed):
    columns = [np.asarray(column) for column in columns]
    m = len(columns[0])
    samples = np.random.RandomState(seed).choice(m, (resamples, m))
    return np.array([score(*(column[sample] for column in columns)) for sample in samples])


def multi_bootstrap(a, b, level=LEVEL, seed=0):
    n, R = a.shape
    if n < 2:
        return math.nan, math.nan
    times = np.random.default_rng(seed + 1).multinomial(n, [1 / n] * n, size=R).T
    means = np.sort((times * (a - b)).sum(0) / n)
    cut = (1 - level) / 2 * (R - 1)
    return float(means[math.floor(cut)]), float(means[math.ceil(R - 1 - cut)])
''', "numpy's numbers and a list": '''
def resampled_scores(score, *columns, resamples, seed):
    columns = list(map(np.asarray, columns))
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(columns[0]), size=(resamples, len(columns[0])))
    return [score(*(column[rows] for column in columns)) for rows in draws]


def multi_bootstrap(a, b, level=LEVEL, seed=0):
    if len(a) == 1:
        return np.nan, np.nan
    rows = np.random.default_rng(seed).integers(len(a), size=a.shape)
    means = np.take_along_axis(a - b, rows, 0).mean(0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return low, high
'''}, [
    ("seeds alone", "a[seeds, columns] - b[seeds, columns]",
     "a.mean(1)[seeds] - b.mean(1)[seeds]"),
    ("examples alone", "rng.integers(0, n, size=(n, R))", "np.arange(n)[:, None]"),
    ("a single seed a column", "size=(n, R)", "size=(1, R)"),
    ("the same seeds in every column", "size=(n, R)", "size=(n, 1)"),
    ("seeds without replacement", "rng.integers(0, n, size=(n, R))",
     "rng.permuted(np.arange(n)[:, None].repeat(R, 1), axis=0)"),
    ("each side by itself", "b[seeds, columns]",
     "b[rng.integers(0, n, size=(n, R)), columns]"),
    ("b minus a", "a[seeds, columns] - b[seeds, columns]",
     "b[seeds, columns] - a[seeds, columns]"),
    ("the whole error in each tail", "tail = (1 - level) / 2", "tail = 1 - level"),
    ("a fixed level", "tail = (1 - level) / 2", "tail = 0.025"),
    ("one seed has an interval", "if n == 1:", "if n == 0:"),
    ("the seed is ignored", "np.random.default_rng(seed)\n    n, R",
     "np.random.default_rng(0)\n    n, R"),
    ("the last seed is never drawn", "rng.integers(0, n, ", "rng.integers(0, n - 1, "),
    ("examples without replacement", "rng.integers(0, m, size=m)", "rng.permutation(m)"),
    ("half as many examples", "rng.integers(0, m, size=m)", "rng.integers(0, m, size=m // 2)"),
    ("columns by themselves", "column[rows] for column",
     "column[rng.integers(0, m, size=m)] for column"),
    ("the examples depend on the clock", "rng = np.random.default_rng(seed)\n    columns",
     "rng = np.random.default_rng()\n    columns"),
    ("the examples ignore the seed", "rng = np.random.default_rng(seed)\n    columns",
     "rng = np.random.default_rng(0)\n    columns"),
    ("the first examples only", "rng.integers(0, m, size=m)",
     "rng.integers(0, m - m // 4, size=m)"),
    ("a median", "np.mean(", "np.median("),
])

# --- 20: Typhoon from the task's labels -----------------------------------------------------------

SOLUTIONS[20] = Solutions({"two gradients": '''
class TaskTyphoon:
    def learn_from_labels(self, batch):
        words = self.context.model.bert.embeddings.word_embeddings(batch.input_ids)
        words = words.detach().requires_grad_()
        logits = self.probe(attention_mask=batch.attention_mask,
                            token_type_ids=batch.token_type_ids, inputs_embeds=words)
        loss = task_loss(logits, self.labels[batch.index])
        gradient, *head = torch.autograd.grad(loss, [words, *self.head])
        self.observe(batch, None, gradient)
        for parameter, found in zip(self.head, head):
            parameter.grad = found
        self.head_optimizer.step()
        self.head_optimizer.zero_grad()
''', "everything backwards, and the encoder's gradients thrown away": '''
from masking import embedding_saliency


class TaskTyphoon:
    def learn_from_labels(self, batch):
        self.probe.zero_grad()
        words = self.probe.bert.embeddings.word_embeddings(batch.input_ids)
        words.retain_grad()
        logits = self.probe(inputs_embeds=words, attention_mask=batch.attention_mask,
                            token_type_ids=batch.token_type_ids)
        task_loss(logits, self.labels[batch.index]).backward()
        weight = self.probe.bert.embeddings.word_embeddings.weight
        dot = embedding_saliency(words.grad, weight, batch.input_ids)
        self.typhoon.accumulate(batch.input_ids, dot, batch.maskable)
        self.head_optimizer.step()
        self.probe.zero_grad()
''', "the head's gradients are left until the next call": '''
class TaskTyphoon:
    def learn_from_labels(self, batch):
        self.head_optimizer.zero_grad()
        words = self.probe.bert.embeddings.word_embeddings(batch.input_ids)
        words = words.detach().requires_grad_()
        logits = self.probe(inputs_embeds=words, attention_mask=batch.attention_mask,
                            token_type_ids=batch.token_type_ids)
        task_loss(logits, self.labels[batch.index]).backward(inputs=[words, *self.head])
        self.observe(batch, None, words.grad)
        self.head_optimizer.step()
'''}, [
    ("the shared encoder is left in evaluation mode", "loss = ", "self.probe.eval()\n        loss = "),
    ("labels in the order of the batch", "self.labels[batch.index]",
     "self.labels[:len(batch.index)]"),
    ("no attention mask", "attention_mask=batch.attention_mask", "attention_mask=None"),
    ("no token types", "token_type_ids=batch.token_type_ids", "token_type_ids=None"),
    ("everything is masked", "self.observe(batch, None,", "self.observe(batch, batch.maskable,"),
    ("the average hears nothing", "self.observe(batch, None, gradient)", "pass"),
    ("the head stays as it is", "self.head_optimizer.step()", "pass"),
    ("two steps of the head", "self.head_optimizer.step()",
     "self.head_optimizer.step(); self.head_optimizer.step()"),
    ("the head's gradients add up", "parameter.grad = found",
     "parameter.grad = found if parameter.grad is None else parameter.grad + found",
     "self.head_optimizer.zero_grad()", "self.kept = [p.grad for p in self.head]\n"
     "        for p in self.head:\n            p.grad = None",
     "for parameter, found", "for p, g in zip(self.head, getattr(self, 'kept', [])):\n"
     "            p.grad = g\n        for parameter, found"),
    ("a sum over the texts", "task_loss(logits, self.labels[batch.index])",
     "task_loss(logits, self.labels[batch.index]) * len(logits)"),
    ("gradients in the encoder", "gradient, *head =",
     "loss.backward(retain_graph=True)\n        gradient, *head ="),
    ("the encoder learns", "self.head_optimizer.step()",
     "self.head_optimizer.step()\n        with torch.no_grad():\n"
     "            for p in self.probe.bert.layers.parameters():\n                p *= 0.999"),
    ("the encoder is frozen", "words = words.detach()",
     "self.probe.bert.layers.requires_grad_(False)\n        words = words.detach()"),
    ("the text with masks", "word_embeddings(batch.input_ids)",
     "word_embeddings(batch.input_ids.masked_fill(batch.maskable, self.context.mask_token_id))"),
    ("always classes", "task_loss(logits, self.labels[batch.index])",
     "F.cross_entropy(logits, self.labels[batch.index].long())"),
    ("the gradient's sign", "self.observe(batch, None, gradient)",
     "self.observe(batch, None, -gradient)"),
])
