"""The method on plain PyTorch: two stages with local losses, streamed; FedAvg over two clients.

Stage 0 is the client's: the embeddings and an encoder layer. Stage 1 is the server's: another
layer. Each has a masked-LM head, a loss and an optimizer of its own, and only activations travel,
forwards: no stage waits for a gradient. Usage: ``python examples/train_loop.py``
"""

import copy
import queue
import threading

import torch
from torch import nn

CLIENTS = [
    "the heart pumps blood to the lungs . the lungs give oxygen to the blood . the blood carries "
    "oxygen to the brain . the brain controls the heart . the kidney cleans the blood .",
    "the virus infects the cell . the cell makes the protein . the protein blocks the virus . "
    "the drug stops the virus . the virus enters the lungs . the blood carries the drug .",
]
WORDS = ["[mask]", *sorted(set(" ".join(CLIENTS).split()))]
LENGTH, WIDTH, BATCH, NUM_ROUNDS, NUM_LOCAL_STEPS = 12, 64, 16, 8, 25


class Stage(nn.Module):
    """A part of the encoder, with a head that gives it a loss of its own."""

    def __init__(self, *, is_first):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH) if is_first else None
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH)) if is_first else None
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, len(WORDS))

    def forward(self, inputs, masked, labels):
        hidden = self.layer(self.words(inputs) + self.positions if self.words else inputs)
        return hidden, nn.functional.cross_entropy(self.head(hidden[masked]), labels)


def batches(text):
    """Cut blocks out of a client's text and mask 15 % of their words."""
    tokens = torch.tensor([WORDS.index(word) for word in text.split()])
    for _ in range(NUM_LOCAL_STEPS):
        block = tokens[torch.randint(len(tokens) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH)]
        masked = torch.rand(block.shape) < 0.15
        yield block.masked_fill(masked, 0), masked, block[masked]


def train(stage, source, send, losses):
    """Train a stage on what arrives; send activations on before the backward pass."""
    optimizer = torch.optim.AdamW(stage.parameters(), lr=2e-3)
    for inputs, masked, labels in source:
        hidden, loss = stage(inputs, masked, labels)
        send((hidden.detach(), masked, labels))  # detached: no gradient comes back over the cut
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())


torch.manual_seed(0)
global_stages = [Stage(is_first=True), Stage(is_first=False)]
for round_id in range(NUM_ROUNDS):
    replicas, losses = [], ([], [])
    for text in CLIENTS:
        client, server = replica = copy.deepcopy(global_stages)
        link = queue.Queue(maxsize=2)  # the client runs ahead of the server by so many messages
        arriving, nowhere = iter(link.get, None), lambda message: None
        thread = threading.Thread(target=train, args=(server, arriving, nowhere, losses[1]))
        thread.start()
        train(client, batches(text), link.put, losses[0])
        link.put(None)
        thread.join()
        replicas.append(replica)
    for stage_id, stage in enumerate(global_stages):  # FedAvg, per stage; both have equal weight
        states = [replica[stage_id].state_dict() for replica in replicas]
        stage.load_state_dict({k: sum(s[k] for s in states) / len(states) for k in states[0]})
    means = [sum(own) / len(own) for own in losses]
    print(f"round {round_id + 1}  loss of stage 0 {means[0]:.3f}  of stage 1 {means[1]:.3f}")
