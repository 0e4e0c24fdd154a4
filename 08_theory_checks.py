r"""08 - Theory checks: every claim of a course, a number.

Paper    The claims are statements and questions of five coursework reports ("a
         report": one of them, "the course": any), and textbook facts behind
         them. Papers are named at each claim.
Idea     a claim predicts a number: compute it another way          -> agree()
         a claim says that two things are equal: compute both       -> equal()
         a wrong claim: compute a counterexample                    -> @refuted
         Functions to paste stand above the claims that use them.
See      a table for each topic: claim, what it expects, what was measured,
         verdict. 78 claims: 53 hold, 25 are refuted. Exit status 1 if the
         evidence for a verdict fails for one of 5 seeds. Eight figures in
         out/08_theory_checks, among them receptive fields and games of GANs.
Read     "The course says yes": it states the claim; others it calls false, or
         only asks. The verdict is ours. x [B, d]: x has the shape (B, d). σ(a):
         the sigmoid. nats: natural logs. .to(x): with x's dtype.
Differs  No data and nothing from other chapters; float64 or float32 on the CPU.
Try      Take "+ lam * w2" out of mlp_grads. Which of the claims mlp-grads and
         mlp-backprop loses its evidence? Predict it, then run both (--only).
Run      python 08_theory_checks.py
         python 08_theory_checks.py --predict --only optimal-d g-loss-alone
"""

import contextlib
import difflib
import functools
import itertools
import math
import textwrap
from typing import NamedTuple

import torch
from torch import nn
from torch.func import jacrev, vmap
from torch.nn import functional as F

import common

SEEDS = 5              # a verdict counts only if the evidence confirms it for all of them
ROUNDING = 1e-10       # float64 keeps 16 digits; what is exact on paper agrees to at least 10


# --- the idea ----------------------------------------------------------------------------------

class Claim(NamedTuple):
    """A claim: its topic, its verdict and the check that must confirm the verdict.

    check() returns (what the claim expects, what was measured, evidence): two texts, and True if
    what was measured confirms the verdict."""
    topic: str
    verdict: str  # "holds" or "refuted"
    check: object


TOPICS = {}   # the introduction of each topic
CLAIMS = {}   # by id, in the order of this file
FIGURES = {}  # by file name: what save_figure needs to draw it


def topic(name, introduction):
    """Opens a topic: a claim belongs to the topic that was opened last."""
    TOPICS[name] = " ".join(introduction.split())


def register(check, verdict):
    """Keeps a check as a claim. The id is the check's name, with "-" for "_". If a function to
    paste has that name already, the check's ends in an underscore, which is not part of the id."""
    name = check.__name__.rstrip("_").replace("_", "-")
    assert name not in CLAIMS, f"two claims are called {name}"
    CLAIMS[name] = Claim(list(TOPICS)[-1], verdict, check)
    return check


# decorators of a check: the claim is right, or wrong, and the evidence must show exactly that
holds = functools.partial(register, verdict="holds")
refuted = functools.partial(register, verdict="refuted")


def row(name, text, expected, compute):
    """A claim of plain arithmetic, which holds: compute() must give exactly what is expected, a
    list of numbers or a text."""
    def as_text(value):
        return value if isinstance(value, str) else ", ".join(f"{v:,.10g}" for v in value)

    def check():
        measured = compute()
        return as_text(expected), as_text(measured), measured == expected

    check.__name__, check.__doc__ = name, text  # so that a row looks like a checked function
    holds(check)


def agree(expected, measured, unit="", tolerance=ROUNDING, note="", and_also=True):
    """The claim is that two numbers agree: to `tolerance` times max(1, |expected|).

    note: shown beside what was measured. and_also: a second condition, which must be true, too."""
    close = abs(measured - expected) <= tolerance * max(1, abs(expected))
    text = f"{measured:.6g} {unit}".strip()
    if note:
        text += f" ({note})"
    return f"{expected:.6g} {unit}".strip(), text, close and bool(and_also)


def equal(*pairs, note="", and_also=True):
    """The claim is that tensors are equal, pair by pair: no entry differs by more than rounding.

    note and and_also: as for agree."""
    differences = torch.stack([(a - b).abs().max().double() for a, b in pairs])
    worst = differences.max().item()  # torch's max, unlike Python's, never loses a nan
    text = f"difference {worst:.0e}" if worst else "difference 0"
    if note:
        text += f" ({note})"
    return "difference 0", text, worst <= ROUNDING and bool(and_also)


def double(numbers):
    """A float64 tensor of the numbers."""
    return torch.tensor(numbers, dtype=torch.float64)


def normal(*shape):
    """Standard normal float64 tensor."""
    return torch.randn(*shape, dtype=torch.float64)


def gradient(f, *inputs):
    """∂f/∂input by autograd: a tensor for one input, a tuple for several."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(f(*inputs), inputs)
    return grads[0] if len(grads) == 1 else grads


def figure(name, title, panels=1, rows=1, width=4.5, height=3.8):
    """Decorator of draw(panel, ...): name.png has `panels` of width x height inches in `rows`."""
    def keep(draw):
        FIGURES[name] = draw, title, panels, rows, width, height
        return draw
    return keep


def save_figure(path, draw, title, panels, rows, width, height):
    """Draws the panels and puts the legend of each below it, where it hides no data."""
    columns = panels // rows
    fig, axes = common.figure(rows, columns, width * columns, height * rows, title)
    draw(*axes.flat)
    for ax in axes.flat:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)
    common.save_figure(fig, path)


# --- layers ------------------------------------------------------------------------------------

topic("layers", """
    What does one output of a network see of its input, and how does a gradient find its way back
    through a layer? The first claims count pixels, because a network can only use what it sees.
    The others take one layer at a time: each can be written as a small sum, so its expectation or
    its gradient can be computed by hand and compared.""")

# a layer is (kernel, stride, padding, dilation) along one axis; kernels are square
CONV, POOL = (3, 1, 1, 1), (2, 2, 0, 1)
ALEXNET = [(11, 4, 2, 1), (3, 2, 0, 1), (5, 1, 2, 1), (3, 2, 0, 1)] + 3 * [CONV] + [(3, 2, 0, 1)]
VGG_A = 2 * [CONV, POOL] + 3 * [CONV, CONV, POOL]
VGG_16 = 2 * [CONV, CONV, POOL] + 3 * [CONV, CONV, CONV, POOL]
# MobileNet's 1x1 convolutions widen nothing and are left out
MOBILENET = [(3, s, 1, 1) for s in (2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)]
DCGAN_D = 4 * [(4, 2, 1, 1)] + [(4, 1, 0, 1)]  # DCGAN's discriminator D


def resnet_50(stride_in):
    """The list of layers on the path through the 3x3 convolutions (the shortcuts see less).

    stride_in: which convolution of a stage's first block has the stride, "1x1" or "3x3"."""
    layers = [(7, 2, 3, 1), (3, 2, 1, 1)]
    for blocks, stride in ((3, 1), (4, 2), (6, 2), (3, 2)):
        for s in [stride] + [1] * (blocks - 1):
            layers += [(1, s, 0, 1), CONV] if stride_in == "1x1" else [(3, s, 1, 1)]
    return layers


def receptive_field(layers):
    """What an output of a stack of layers sees: (size, stride, padding) of the stack as one layer.

    layers: (kernel, stride, padding, dilation) along one axis of each convolution or pooling, from
    the input on. Output j sees the inputs j stride - padding ... j stride - padding + size - 1. An
    empty stack is (1, 1, 0). After k layers the size is r_k = r_{k-1} + (g_k - 1) Π_{i<k} s_i: s_i
    is the stride of layer i, and g_k = dilation (kernel - 1) + 1 the length of kernel k."""
    size, stride, padding = 1, 1, 0
    for kernel, s, p, dilation in layers:
        size += dilation * (kernel - 1) * stride
        padding += p * stride
        stride *= s
    return size, stride, padding


def seen_inputs(layers, j, n):
    """First and last of n inputs on which output j of a 1-D network with weights 1 depends."""
    def output(x):
        for kernel, stride, padding, dilation in layers:
            x = F.conv1d(x, torch.ones(1, 1, kernel).to(x), None, stride, padding, dilation)
        return x[0, 0, j]

    seen = gradient(output, torch.ones(1, 1, n, dtype=torch.float64))[0, 0].nonzero()
    return seen.min().item(), seen.max().item()


@holds
def rf_recursion():
    """r_k = r_{k-1} + (g_k - 1) Π_{i<k} s_i, g = dilation (kernel - 1) + 1.

    The course says yes. A kernel of layer k takes g_k - 1 steps, each Π_{i<k} s_i pixels long. The
    course also says that padding matters, but padding is not in the formula: it moves the field and
    does not widen it. In 20 random networks, padded by 0 to 3 pixels in each layer, the formula
    must name the first and last input with a nonzero gradient."""
    right = 0
    for _ in range(20):
        depth = torch.randint(1, 5, ()).item()
        layers = (torch.randint(4, (depth, 4)) + torch.tensor([1, 1, 0, 1])).tolist()
        size, stride, padding = receptive_field(layers)
        j = math.ceil(padding / stride)  # the first output that looks at no padding
        first = j * stride - padding
        right += seen_inputs(layers, j, 2 * (first + size)) == (first, first + size - 1)
    return agree(20, right, "of 20 networks")


def sizes_per_layer(net):
    """The size of the receptive field after each layer."""
    return [receptive_field(net[:i])[0] for i in range(1, len(net) + 1)]


row("rf-nets",
    """Receptive fields: AlexNet 195, VGG-16 212, MobileNet v1 315, DCGAN's D 94, ResNet-50 427.

    ResNet-50 sees 427 with the stride of a stage in its first 3x3 (torchvision), but 483 with the
    stride in the 1x1 before (He et al. 2016): a stride widens the steps of all later layers.""",
    [195, 212, 315, 94, 427, 483],
    lambda: [receptive_field(net)[0] for net in (ALEXNET, VGG_16, MOBILENET, DCGAN_D,
                                                 resnet_50("3x3"), resnet_50("1x1"))])

row("rf-alexnet",
    """AlexNet's conv1, pool1, conv2, pool2, conv3, conv4, conv5, pool5 see 11 to 195 pixels.

    Its early strides are why it sees most of its 224 pixels after five convolutions: conv1 has the
    stride 4, pool1 and pool2 have 2, so conv3 steps by 4 · 2 · 2 = 16 pixels. Each 3x3 from there
    to pool5 adds 2 · 16 = 32.""",
    [11, 19, 51, 67, 99, 131, 163, 195],
    lambda: sizes_per_layer(ALEXNET))

row("rf-vgg-a",
    """The 8 convolutions and 5 poolings of VGG-A, in their order, see 3 to 150 pixels.

    Its kernels are small, so the growth comes from the poolings: a 3x3 adds 2 pixels before the
    first pooling, then 4, 8, 16, 32.""",
    [3, 4, 8, 10, 18, 26, 30, 46, 62, 70, 102, 134, 150],
    lambda: sizes_per_layer(VGG_A))

GROWTH = {"plain": 4 * [CONV], "stride 2": 4 * [(3, 2, 1, 1)],
          "pooling": 4 * [CONV, POOL], "dilation": [(3, 1, d, d) for d in (1, 2, 4, 8)]}

row("rf-growth",
    """Stride and pooling multiply all later growth and cost resolution; dilation costs none.

    The course says yes. Four 3x3 convolutions: "31/16" means that an output sees 31 pixels, and
    that there is one for every 16. Dilation 1, 2, 4, 8 sees as far as stride 2, at stride 1.""",
    "plain 9/1, stride 2 31/16, pooling 46/16, dilation 31/1",
    lambda: ", ".join("{} {}/{}".format(name, *receptive_field(net)[:2])
                      for name, net in GROWTH.items()))


@figure("receptive_field", "Receptive field: what four layers see, and what it costs", panels=2)
def draw_receptive_field(sizes, strides):
    for name, net in GROWTH.items():
        found = [receptive_field(net[:i]) for i in range(len(net) + 1)]
        x = [4 * i / len(net) for i in range(len(net) + 1)]  # a pooling is half a step
        look = dict(marker="o", markersize=3, linestyle="--" if name == "dilation" else "-")
        sizes.plot(x, [size for size, _, _ in found], label=name, **look)
        strides.plot(x, [stride for _, stride, _ in found], label=name, **look)
    sizes.set(title="stride 2 and dilation agree", xlabel="convolutions",
              ylabel="pixels that one output sees")
    strides.set(title="plain and dilation agree", xlabel="convolutions",
                ylabel="pixels per output", yscale="log")
    strides.set_yticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])


@holds
def residual_filters():
    """In y = f(x) + x the best linear filter f is the plain best filter minus the identity kernel.

    The course says "it learns the difference", after He et al. 2016. For one linear convolution
    and least squares this is exact, because f(x) + x is again a convolution."""
    x = normal(8, 1, 12, 12)
    y = F.conv2d(x, normal(1, 1, 3, 3)) + 0.3 * normal(8, 1, 10, 10)
    patches = F.unfold(x, 3).transpose(1, 2).reshape(-1, 9)  # [800, 9]: what each output sees
    difference = y - x[..., 1:-1, 1:-1]                      # [8, 1, 10, 10]
    plain = torch.linalg.lstsq(patches, y.reshape(-1, 1)).solution              # [9, 1]
    residual = torch.linalg.lstsq(patches, difference.reshape(-1, 1)).solution  # [9, 1]
    identity = torch.eye(9, dtype=torch.float64)[:, 4:5]     # 1 in the middle of the 3x3
    return equal((residual, plain - identity))


def masks(n, p):
    """All 2^n dropout masks [2^n, n] and their probabilities [2^n]; p: probability of a 0."""
    m = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=torch.float64)
    return m, (m * (1 - p) + (1 - m) * p).prod(dim=1)


def dropout_mask_average(x, p, f=lambda x: x):
    """Exact E f(x m / (1 - p)) over all 2^n masks m, which keep an entry with probability 1 - p.

    x [n]; f maps [n] to a tensor; the identity if left out. n up to about 15, 0 <= p < 1."""
    m, probability = masks(len(x), p)
    return sum(w * f(x * kept / (1 - p)) for w, kept in zip(probability, m))


@holds
def dropout_scale():
    """Scaling by 1/(1 - p) keeps the expectation: E dropout(x) = x.

    The course says yes, but its proof leaves out the mask, and without it nothing is random. With
    it, E m x / (1 - p) = (1 - p) x / (1 - p) + p 0 = x. The mask does show in the square, whose
    expectation is not x² but x² / (1 - p)."""
    x, p, n = normal(8), 0.3, 10_000
    exact, square = dropout_mask_average(x, p), dropout_mask_average(x, p, torch.square)
    drawn = F.dropout(x.expand(n, -1), p).mean(dim=0)
    within = (drawn - x).abs() <= 6 * x.abs() * (p / (1 - p) / n) ** 0.5  # 6 standard deviations
    return equal((exact, x), (square, x ** 2 / (1 - p)), and_also=within.all())


@holds
def dropout_merge():
    """Dropout(p1) then Dropout(p2) is Dropout(1 - (1 - p1)(1 - p2)).

    The course did not write it out: a unit stays if it stays twice, and the factors 1/(1 - p1) and
    1/(1 - p2) multiply to the factor of the single dropout."""
    n, p1, p2 = 4, 0.2, 0.5
    merged, single = masks(n, 1 - (1 - p1) * (1 - p2))
    twice = torch.zeros_like(single)
    for m1, w1 in zip(*masks(n, p1)):
        for m2, w2 in zip(*masks(n, p2)):
            twice += w1 * w2 * (merged == m1 * m2).all(dim=1)
    return equal((twice, single))


@refuted
def dropout_place():
    """Dropout must come after the activation, not before.

    The course says that this is false, and it is. ReLU is the counterexample: relu(x m) = relu(x) m
    for every mask m. The sigmoid, which turns a dropped 0 into 1/2, is the control: it shows that
    the check can see a difference."""
    x, m = normal(100), (torch.rand(100) < 0.5).double()
    relu, sigmoid = ((f(x * m) - f(x) * m).abs().max().item() for f in (torch.relu, torch.sigmoid))
    return "ReLU: not 0", f"ReLU {relu:g}, sigmoid {sigmoid:g}", relu == 0 and sigmoid > 0


def check_conv(x_size, w_size, y_size, **how):
    """Raises ValueError unless the convolution of x with w gives y, from the three shapes, of four
    numbers each. how: stride, padding, dilation and groups, as of F.conv2d, all four."""
    x, w = (torch.empty(*size, device="meta") for size in (x_size, w_size))  # sizes, no numbers
    with contextlib.suppress(RuntimeError):  # torch's, if they do not fit at all
        fits = F.conv2d(x, w, **how).shape == tuple(y_size) and w_size[0] % how["groups"] == 0
        if fits and min(y_size[2:]) > 0:  # before torch 2.14 a kernel could be too large here
            return
    raise ValueError(f"{how['groups']} groups: the convolution of {tuple(x_size)} with "
                     f"{tuple(w_size)} does not give {tuple(y_size)}")


def conv2d_grad_input(input_size, weight, grad_output, stride=1, padding=0, dilation=1, groups=1):
    """∂L/∂x of y = conv2d(x, weight): each ∂L/∂y goes back, times w, to the pixels it came from.

    On one axis ∂L/∂x[i s + u d - p] += w[u] ∂L/∂y[i], for output i, kernel entry u, stride s,
    dilation d and padding p. Arguments and result as in torch.nn.grad.conv2d_input: input_size
    [B, C, H, W], weight [O, C / groups, h, w], grad_output [B, O, H', W'], in any memory layout.
    Raises ValueError if the sizes do not fit."""
    check_conv(input_size, weight.shape, grad_output.shape, stride=stride, padding=padding,
               dilation=dilation, groups=groups)
    grad = grad_output.flatten(2).unflatten(1, (groups, -1))         # [B, g, O/g, H' W']
    w = weight.flatten(1).unflatten(0, (groups, -1))                 # [g, O/g, C/g h w]
    patches = torch.einsum("bgol,gok->bgkl", grad, w).flatten(1, 2)  # [B, C h w, H' W']
    return F.fold(patches, input_size[2:], weight.shape[2:], dilation, padding, stride)


def conv2d_grad_weight(input, weight_size, grad_output, stride=1, padding=0, dilation=1, groups=1):
    """∂L/∂w of y = conv2d(input, w): each weight meets one pixel of every patch of the image.

    On one axis ∂L/∂w[u] = Σ_i input[i s + u d - p] ∂L/∂y[i], as above, summed over the batch.
    Arguments and result as in torch.nn.grad.conv2d_weight: input [B, C, H, W], weight_size
    [O, C / groups, h, w], tensors in any memory layout. Raises ValueError if the sizes do not
    fit."""
    check_conv(input.shape, weight_size, grad_output.shape, stride=stride, padding=padding,
               dilation=dilation, groups=groups)
    patches = F.unfold(input, weight_size[2:], dilation, padding, stride)
    patches = patches.unflatten(1, (groups, -1))                     # [B, g, C/g h w, H' W']
    grad = grad_output.flatten(2).unflatten(1, (groups, -1))         # [B, g, O/g, H' W']
    return torch.einsum("bgol,bgkl->gok", grad, patches).reshape(weight_size)


def true_convolution(a, b, padding=0):
    """a * b: conv2d with the kernel b turned round; a [1, 1, H, W], b [1, 1, h, w]."""
    return F.conv2d(a, b.flip(2, 3), padding=padding)


def random_conv(x_size, w_size, y_size, **how):
    """A random layer y = conv2d(x, w): x, w, ∂L/∂y, and by autograd ∂L/∂x and ∂L/∂w."""
    x, w, grad = normal(*x_size), normal(*w_size), normal(*y_size)
    return x, w, grad, *gradient(lambda x, w: (F.conv2d(x, w, **how) * grad).sum(), x, w)


PLAIN_SIZES = (1, 1, 7, 6), (1, 1, 3, 3), (1, 1, 5, 4)  # of x, w and y
GROUPED_SIZES = (2, 4, 9, 8), (6, 2, 3, 3), (2, 6, 5, 4)
GROUPED = dict(stride=2, padding=1, groups=2)


@holds
def conv_grad_input():
    """If y is the cross-correlation of image I and filter f, then ∂L/∂I = grad * f.

    The course says so, with grad = ∂L/∂y. It is right if * is the true convolution, which turns f
    round, and wrong if * is a correlation, as conv2d is. conv2d_grad_input is the general form."""
    image, f, grad, by_autograd, _ = random_conv(*PLAIN_SIZES)
    x, w, grad_large, large_by_autograd, _ = random_conv(*GROUPED_SIZES, **GROUPED)
    # padding=2 adds the places where the 3x3 filter touches only the rim of grad: 7 x 6 in all
    wrong = (by_autograd - F.conv2d(grad, f, padding=2)).abs().max().item()
    return equal((by_autograd, true_convolution(grad, f, padding=2)),
                 (by_autograd, conv2d_grad_input(image.shape, f, grad)),
                 (large_by_autograd, conv2d_grad_input(x.shape, w, grad_large, **GROUPED)),
                 note=f"correlation: {wrong:.1f}", and_also=wrong > 0.1)


@holds
def conv_grad_weight():
    """If y is the cross-correlation of image I and filter f, then ∂L/∂f = I * flip(grad).

    The course says so, and it is right if * is the true convolution: that turns grad round a second
    time, so the gradient is the correlation of I and grad. Without the flip it is wrong."""
    image, f, grad, _, by_autograd = random_conv(*PLAIN_SIZES)
    x, w, grad_large, _, large_by_autograd = random_conv(*GROUPED_SIZES, **GROUPED)
    wrong = (by_autograd - true_convolution(image, grad)).abs().max().item()
    return equal((by_autograd, true_convolution(image, grad.flip(2, 3))),
                 (by_autograd, conv2d_grad_weight(image, f.shape, grad)),
                 (large_by_autograd, conv2d_grad_weight(x, w.shape, grad_large, **GROUPED)),
                 note=f"no flip: {wrong:.1f}", and_also=wrong > 0.1)


@holds
def conv_transpose():
    """The gradient of a convolution with respect to its input is a transposed convolution.

    The course says yes. The gradients at the outputs are spread 2 pixels apart, with zeros between.
    Inputs of 7 and of 8 pixels both give 4 outputs; output_padding=1 says that it was 8."""
    _, w, grad, by_autograd, _ = random_conv((2, 3, 8, 8), (4, 3, 3, 3), (2, 4, 4, 4),
                                             stride=2, padding=1)
    return equal((by_autograd, F.conv_transpose2d(grad, w, stride=2, padding=1, output_padding=1)))


def transposed_coverage(layers, n=1):
    """How many paths lead from n inputs to each output of a stack of transposed convolutions.

    layers: (kernel, stride, padding) along one axis of each, from the input on. Returns int64
    [size]: a layer makes (n - 1) stride + kernel - 2 padding outputs of n. Where it is 0, an output
    is the same for every input: 0, or what the biases make of it. In a picture, pixel (i, j) has
    the product of the paths to i and to j. Raises ValueError if a padding leaves no output."""
    paths = torch.ones(n, dtype=torch.int64)
    for kernel, stride, padding in layers:
        spread = torch.zeros((len(paths) - 1) * stride + kernel, dtype=torch.int64)
        for u in range(kernel):
            spread[u:len(spread) - kernel + u + 1:stride] += paths
        if len(spread) <= 2 * padding:
            raise ValueError(f"{(kernel, stride, padding)} leaves nothing of {len(paths)} inputs")
        paths = spread[padding:len(spread) - padding]
    return paths


def covered(layers):
    """Which pixels of the square picture get something from the code, bool [size, size]."""
    along = transposed_coverage(layers) > 0
    return along[:, None] & along


# from a code of one pixel: 4, 8, 16; then the report's last two layers, and two that give 28
TO_16 = [(4, 1, 0), (4, 2, 1), (4, 2, 1)]
REPORT_G, FIXED_G = TO_16 + [(1, 1, 2), (1, 2, 1)], TO_16 + [(3, 1, 2), (4, 2, 1)]


@holds
def transposed_coverage_():
    """The DCGAN generator of a report draws 21x21 pictures; 77.3 % of their pixels are always 0.

    The report asks why it gets digits wrong every time. Its last two layers have kernels of 1: with
    padding 2 the first cuts 16 to 12, and stride 2 with padding 1 spreads 12 to 21 with gaps. MNIST
    has 28x28 and a ground of -1, so D needs only the ground. No loss or label can help: compare the
    shapes and the ground of real and fake first. The check draws 20 codes. FIXED_G has no gaps."""
    def draw(layers):
        x = torch.randn(20, 1, 1, 1)
        for kernel, stride, padding in layers:
            x = F.conv_transpose2d(x, torch.randn(1, 1, kernel, kernel), None, stride, padding)
        return x[:, 0]

    report, fixed = ((draw(layers) != 0).any(dim=0) for layers in (REPORT_G, FIXED_G))
    expected = "21x21, 77.3% empty"
    text = f"{len(report)}x{len(report)}, {(~report).double().mean():.1%} empty"
    return (expected, f"{text} (fixed: {len(fixed)}x{len(fixed)}, "
            f"{(~fixed).double().mean():.0%})",
            text == expected and torch.equal(fixed, torch.ones(28, 28).bool())
            and torch.equal(report, covered(REPORT_G)) and torch.equal(fixed, covered(FIXED_G)))


@figure("transposed_coverage", "Which pixels does the generator reach? White: they depend on the "
        "code. Black: 0 in every picture.", panels=2)
def draw_transposed_coverage(*panels):
    for ax, layers, name in zip(panels, (REPORT_G, FIXED_G), ("the report's", "fixed")):
        reached = covered(layers)
        ax.imshow(reached, cmap="gray", vmin=0, vmax=1)
        last = ";\n".join("kernel {}, stride {}, padding {}".format(*one) for one in layers[-2:])
        size, share = len(reached), reached.double().mean()
        ax.set(title=f"{name}: {size}x{size}, {share:.1%} of the pixels reached",
               xlabel=f"last two layers: {last}", xticks=[], yticks=[])


@holds
def activation_jacobian():
    """Back through an elementwise activation is elementwise multiplication by its derivative.

    The course says yes. Output y_i depends on x_i only, so the Jacobian ∂y_i/∂x_j is diagonal."""
    x, grad = normal(6), normal(6)
    jacobian = jacrev(torch.tanh)(x)
    derivative = 1 - torch.tanh(x) ** 2
    return equal((jacobian, torch.diag(derivative)), (grad @ jacobian, grad * derivative))


@holds
def embedding():
    """nn.Embedding(n, d) is one_hot @ W; indices of shape S give shape S + (d,).

    The course asked, without an answer. Looking rows up only saves the multiplication by zeros, so
    the gradients agree too: a row's gradient is the sum over all places of its index."""
    w, index, grad = normal(5, 3), torch.randint(5, (2, 4)), normal(2, 4, 3)
    one_hot = F.one_hot(index, 5).double()
    looked_up = gradient(lambda w: (F.embedding(index, w) * grad).sum(), w)
    multiplied = gradient(lambda w: (one_hot @ w * grad).sum(), w)
    return equal((F.embedding(index, w), one_hot @ w), (looked_up, multiplied))


@refuted
def embedding_needed():
    """The index of a word can go into a linear layer as a number.

    The course asks why there are embeddings. Numbers have an order: a linear layer with a threshold
    says yes from some index on, or up to it. The words 0 to 7 here alternate between two classes.
    The check tries every threshold, both ways round. With one-hot vectors each word has a weight of
    its own, so every choice of classes is possible."""
    index = torch.arange(8)
    label = index % 2 == 1
    right = max(((index >= cut) ^ turned == label).sum().item()
                for cut in range(9) for turned in (False, True))
    weights = 2.0 * label - 1  # +1 or -1 for each word
    one_hot = ((F.one_hot(index).float() @ weights > 0) == label).sum().item()
    return "8 of 8 right", f"{right} of 8 (one-hot: {one_hot})", right < 8 == one_hot


def self_attention(x, w_q, w_k, w_v):
    """softmax(Q Kᵀ / √d) V with Q = x w_q, K = x w_k, V = x w_v, x [n, d] (Vaswani 2017, eq. 1).

    w_q, w_k, w_v [d, d]. Returns the outputs [n, d] and the weights [n, n], whose rows sum to 1."""
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    weights = (q @ k.T / k.shape[1] ** 0.5).softmax(dim=1)
    return weights @ v, weights


@holds
def attention_order():
    """Self-attention without positions is permutation-equivariant; outputs are averages of values.

    Nothing in softmax(Q Kᵀ / √d) V knows the order of the rows, so permuted inputs give permuted
    outputs (Vaswani et al. 2017 add positions). An output's weights are >= 0 and sum to 1."""
    x, w, order = normal(6, 4), normal(3, 4, 4), torch.randperm(6)
    out, weights = self_attention(x, *w)
    return equal((self_attention(x[order], *w)[0], out[order]), (weights.sum(dim=1), 1),
                 and_also=(weights >= 0).all())


@holds
def attention_alignment():
    """With attention a decoder gets an average of all states of the encoder, not only the last.

    The course asks what this changes. Each input is then one step away: of the first of 20 inputs
    the last state has kept next to nothing, the average has its share. Its weights depend on the
    decoder's own state and say which inputs an output is aligned with. Self-attention among the
    encoder's states instead mixes later inputs into each of them, the same for all outputs."""
    x, w_x, decoder = normal(20, 3), normal(4, 3), normal(4)

    def states(x):
        h = [torch.zeros(4).to(x)]
        for one in x:
            h.append(torch.tanh(w_x @ one + h[-1] / 2))
        return torch.stack(h[1:])

    def attend(h):  # the average of the states, with weights by the decoder's own state
        return (h @ decoder / 2).softmax(dim=0) @ h

    def slopes(f):  # of the entries of f(states) together, in each of the 20 inputs
        return gradient(lambda x: f(states(x)).sum(), x).norm(dim=1)

    eye = torch.eye(4).to(x)
    last, average = slopes(lambda h: h[-1])[0].item(), slopes(attend)[0].item()
    plain, mixed = slopes(lambda h: h[0]), slopes(lambda h: self_attention(h, eye, eye, eye)[0][0])
    return ("the average keeps input 1", f"slope {average:.0e} (last state: {last:.0e})",
            average > 1e4 * last and bool((plain[1:] == 0).all() and (mixed > 0).all()))


row("detector-shapes",
    """YOLO v1 gives S x S x (5 B + C) = 7 x 7 x 30; an RPN 2k scores and 4k offsets per place.

    The course gives no shapes. YOLO (Redmon et al. 2016) has one stage: 24 convolutions and 2 fully
    connected layers say boxes and classes at once. It has S = 7 cells a side, B = 2 boxes of x, y,
    w, h and confidence, C = 20 classes. Faster R-CNN (Ren et al. 2015) has two: a region proposal
    network (RPN) with k = 3 scales x 3 shapes says where to look, a second network what is there.
    The check computes what is no product: a place of the RPN for every 16 pixels (VGG-16 without
    its last pooling), and S = 7, YOLO's 448 pixels over the stride of its layers.""",
    [16, 7],
    lambda: [receptive_field(VGG_16[:-1])[1],
             448 / receptive_field([(7, 2, 3, 1), *4 * [POOL], (3, 2, 1, 1)])[1]])


def average_precision(hits, objects):
    """AP of one class: Σ over the hits of the precision there, over the number of objects.

    hits: for each detection, the most confident first, whether it finds an object that none before
    it has found; a list or a tensor of n booleans. Precision: the share of hits so far. mAP is the
    mean over the classes. Without the interpolation of VOC and COCO: each precision is taken as it
    is. Returns a number, which is 0 without any hit. Raises ValueError if there are fewer objects
    than hits, or none."""
    hits = torch.as_tensor(hits, dtype=torch.bool)
    if not 0 < objects >= hits.sum():
        raise ValueError(f"{int(hits.sum())} hits on {objects} objects")
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, dtype=torch.float64)
    return precision[hits].sum().item() / objects


@holds
def average_precision_():
    """Right, wrong, right on two objects: AP = (1 + 2/3) / 2, the area under precision over recall.

    The course asks what mAP is: the mean of this area over the classes. Recall is the share of
    objects found so far. Missed objects lower the AP, and so does a wrong detection before a right
    one. PASCAL VOC counts a hit from IoU 0.5 on, COCO takes the mean over IoU 0.5 to 0.95; both
    raise each precision to the highest one further down the list first. The area is computed here
    from the whole curve, for 100 random lists."""
    differences = []
    for _ in range(100):
        hits = torch.rand(30, dtype=torch.float64) < 0.5
        found = hits.cumsum(0).double()
        precision, recall = found / torch.arange(1, 31), torch.cat([double([0.0]), found]) / 40
        area = (precision * recall.diff()).sum().item()
        differences.append(abs(area - average_precision(hits, 40)))
    return agree(5 / 6, average_precision([True, False, True], 2),
                 and_also=max(differences) < ROUNDING)


# --- losses, activations -----------------------------------------------------------------------

topic("losses", """
    A network learns through the gradient of its loss, and by the chain rule this gradient is a
    product with a factor from every layer. Small factors make it vanish, large ones make it
    explode, and a factor of zero ends all learning. So the choice of loss and activation is a
    choice of factors. The last two claims are about counting: what a score and a label say.""")


@holds
def bce_vs_l2():
    """At p = 0.45 for label 1: squared error 0.3025, cross-entropy 0.7985.

    The course says yes (0.3 and 0.798). The reason to prefer cross-entropy is the gradient in the
    logit a, the number with p = σ(a): p - 1, against 2 (p - 1) p (1 - p) for the squared error. At
    a = -10, where the network is sure and wrong, the second has vanished."""
    p = double(0.45)
    l2, bce = ((p - 1) ** 2).item(), -p.log().item()
    slope_l2 = gradient(lambda a: (torch.sigmoid(a) - 1) ** 2, double(-10.0)).item()
    slope_bce = gradient(lambda a: -F.logsigmoid(a), double(-10.0)).item()
    return ("0.3025, 0.7985",
            f"{l2:.4f}, {bce:.4f} (slopes at a = -10: {slope_l2:.0e}, {slope_bce:.4f})",
            abs(l2 - 0.3025) < 5e-5 and abs(bce - 0.7985) < 5e-5
            and abs(slope_l2) < 1e-4 and slope_bce < -0.999)


def first_over_last(activation, start=None, depth=24, width=32):
    """‖∂L/∂W_1‖ / ‖∂L/∂W_depth‖ of a deep network; L: random weights times its outputs, 32 samples.

    start: sets the weights and makes the biases 0; torch's own start if left out."""
    layers = [nn.Linear(width, width).double() for _ in range(depth)]
    x = normal(32, width)
    for layer in layers:
        if start:
            start(layer.weight)
            nn.init.zeros_(layer.bias)
        x = activation(layer(x))
    ends = layers[0].weight, layers[-1].weight
    first, last = torch.autograd.grad((x * normal(32, width)).sum(), ends)
    return (first.norm() / last.norm()).item()


@refuted
def sigmoid_tanh():
    """Replacing sigmoid by tanh makes no difference to vanishing gradients.

    The course says "no significant difference". Both saturate, but σ' is at most 1/4 and tanh' is 1
    at 0. The check divides the gradient of the first of 24 layers' weights by that of the last.
    With torch's default start the first weights get nearly nothing from either, but a million times
    more from tanh. With Xavier's start (Glorot, Bengio 2010) tanh is cured and sigmoid is not."""
    sigmoid, sigmoid_xavier, tanh, tanh_xavier = (
        first_over_last(f, start) for f in (torch.sigmoid, torch.tanh)
        for start in (None, nn.init.xavier_normal_))
    return ("about the same", f"{sigmoid:.0e}, {tanh:.0e} (Xavier: {sigmoid_xavier:.0e}, "
            f"{tanh_xavier:.2g})",
            tanh > 1e6 * sigmoid and sigmoid_xavier < 1e-9 and 0.05 < tanh_xavier < 20)


def deep_network(activation, weights, x):
    """Outputs of a network of the layers weights [depth, width, width] for one x [width]."""
    for w in weights:
        x = activation(w @ x)
    return x


def deep_gradient(activation, weights, x):
    """Size of ∂(sum of outputs)/∂x of that network."""
    return gradient(lambda x: deep_network(activation, weights, x).sum(), x).norm().item()


@refuted
def relu_vanish():
    """A ReLU network cannot have vanishing gradients.

    The course says that this is false, and it is: ReLU' = 1 does not help if the weights are small.
    Weights of standard deviation √(2 / width) keep the gradient's size (He et al. 2015). If all of
    them are divided by 7, 20 layers without biases divide the gradient by exactly 7^20."""
    weights, x = (2 / 32) ** 0.5 * normal(20, 32, 32), normal(32)
    he, small = (deep_gradient(torch.relu, w, x) for w in (weights, weights / 7))
    return ("about as before", f"weights / 7: {small / he:.0e} of it",
            abs(small / he * 7 ** 20 - 1) <= 1e-8)


@refuted
def relu_linear():
    """The gradient of ReLU is linear in its input where the input is positive.

    The course says that this is false, and it is: ReLU itself is linear there, so its gradient is
    the constant 1."""
    slopes = gradient(lambda x: torch.relu(x).sum(), torch.tensor([1.0, 2.0, 3.0])).tolist()
    return "1 : 2 : 3", " : ".join(f"{s:g}" for s in slopes), slopes == [1, 1, 1]


@refuted
def relu_sign():
    """ReLU only propagates positive gradients.

    A report says so. ReLU lets a gradient of either sign pass where its *input* was positive, and
    none elsewhere. (Guided backpropagation, Springenberg et al. 2015, also drops the negative ones,
    for pictures of what a unit sees and not for training.)"""
    x, grad = normal(1000), normal(1000)
    passed = gradient(lambda x: (torch.relu(x) * grad).sum(), x)
    negative = (passed < 0).sum().item()
    return ("0 negative", f"{negative} of {(passed != 0).sum()} negative",
            negative > 100 and torch.equal(passed, grad * (x > 0)))


@holds
def relu_dead():
    """ReLU units can die: zero output and zero gradient on all data.

    The course says yes. One step that moves the bias too far is enough (here it is -50). The unit
    gets no gradient as long as its inputs stay as they are. In a hidden layer they move, because
    the layers below it learn through other units: then it may come back, as the check shows."""
    x, w, b = normal(1000, 4), normal(4), double(-50.0)

    def unit(x):
        return torch.relu(x @ w + b), gradient(lambda w, b: torch.relu(x @ w + b).sum(), w, b)

    output, grads = unit(x)
    back = unit(x + 60 * w / (w @ w))[1][1].item()  # inputs that moved: w.x is higher by 60
    return equal((output, 0), *((g, 0) for g in grads),
                 note=f"moved inputs: alive for {back:g} of 1000", and_also=back > 900)


@refuted
def loss_tells_which():
    """The loss alone tells whether gradients vanish or explode.

    It tells half. If they explode, the loss jumps, or is inf or nan. If it stands still, gradients
    may vanish, or training has ended in a minimum, or the rate is 0. The size of ∂L/∂h, from the
    output back to the input of 20 layers, tells these three apart."""
    weights, x, y = (2 / 32) ** 0.5 * normal(20, 32, 32), normal(32), normal(32)
    fit = deep_network(torch.relu, weights, x)  # with this target the weights are a minimum
    runs = {"explodes": (3 * weights, y, 0.01), "vanishes": (weights / 7, y, 0.01),
            "minimum": (weights, fit, 0.01), "rate 0": (weights, y, 0.0)}
    change, sizes = {}, {}  # of the loss in one step; of the gradient at the output, at the input
    for name, (w, target, rate) in runs.items():
        def loss(w, x):
            return ((deep_network(torch.relu, w, x) - target) ** 2).sum() / 2

        change[name] = (loss(w - rate * gradient(lambda w: loss(w, x), w), x) - loss(w, x)).item()
        sizes[name] = ((deep_network(torch.relu, w, x) - target).norm().item(),
                       gradient(lambda x: loss(w, x), x).norm().item())
    jump = change.pop("explodes")
    return ("tells", "still: " + ", ".join("{:.0e} to {:.0e} ({})".format(*sizes[name], name)
                                           for name in change),
            not jump < 1e6 and all(abs(v) < ROUNDING for v in change.values())
            and sizes["vanishes"][1] < 1e-9 < 0.01 < min(sizes["vanishes"][0], *sizes["rate 0"])
            and sizes["minimum"] == (0, 0))


row("depth-numbers",
    """Ten layers that each multiply by 0.5 or by 5: gradients 0.5^10 = 0.0009766, 5^10 = 9,765,625.

    The course says yes: vanishing and exploding gradients in one line.""",
    [0.5 ** 10, 5 ** 10],
    lambda: [gradient(lambda x: math.prod(10 * [factor], start=x), torch.tensor(1.0)).item()
             for factor in (0.5, 5.0)])


def dice_from_iou(iou):
    """Dice = 2 IoU / (1 + IoU), because |A| + |B| = |A ∩ B| + |A ∪ B|.

    iou: a number or a tensor, in [0, 1]; the result is of the same kind."""
    return 2 * iou / (1 + iou)


@holds
def iou_dice():
    """Dice = 2 IoU / (1 + IoU), so Dice >= IoU, with equality only at 0 and 1.

    The course says it in words. Both scores compare two masks A and B: IoU is |A ∩ B| / |A ∪ B|,
    Dice is 2 |A ∩ B| / (|A| + |B|)."""
    a, b = torch.rand(2, 1000, 30) < torch.rand(2, 1000, 1)  # from nearly empty to nearly full
    both, either, sizes = (m.sum(dim=1).double() for m in (a & b, a | b, torch.cat([a, b], dim=1)))
    iou, dice = both / either.clamp(min=1), 2 * both / sizes.clamp(min=1)
    inside = (iou > 0) & (iou < 1)
    return equal((dice, dice_from_iou(iou)),
                 and_also=torch.where(inside, dice > iou, dice == iou).all())


@refuted
def label_constraints():
    """An ImageNet label gives 999 * 2 = 1998 strict inequalities.

    The course says yes: for each of the 999 other classes N it turns N ≠ k, where k is the label,
    into N > k and N < k. But N ≠ k means that one *or* the other is true. Both at once are
    impossible, so there are 999 constraints. The label is 7 here."""
    holding = [(n > 7) + (n < 7) for n in range(1000)]
    return "1998", f"{sum(holding)}, never 2 of one class", holding.count(1) == 999 == sum(holding)


# --- optimisation ------------------------------------------------------------------------------

topic("optimisation", """
    Training is a chain of decisions: compute a gradient (by hand, by differences, by autograd),
    estimate it from a small batch, and follow it. The claims go down that chain. First come two
    ways to make sure that a gradient is right, then what a batch does to it, then where gradient
    descent ends and what it costs, and last what happens if a part of the gradient is cut off,
    never reset, or disturbed by noise.""")


def mlp_loss(x, y, w1, b1, w2, b2, lam):
    """Mean binary cross-entropy (nats) of σ(relu(x W1ᵀ + b1) W2ᵀ + b2) with targets y, plus λ/2
    (‖W1‖² + ‖W2‖²), where ‖W‖² is the sum of all squared entries. The mean is over all entries of
    y; the shapes are those of mlp_grads. Returns a scalar tensor."""
    a2 = torch.relu(x @ w1.T + b1) @ w2.T + b2
    return (F.binary_cross_entropy_with_logits(a2, y)
            + lam / 2 * (w1.pow(2).sum() + w2.pow(2).sum()))


def mlp_grads(x, y, w1, b1, w2, b2, lam):
    """Gradients of mlp_loss by hand: a dict of W1, b1, W2, b2, x, each shaped like its argument.

    x [B, d], y [B, K] with targets 0 to 1, w1 [H, d], b1 [H], w2 [K, H], b2 [K]; often K = 1.
    a1 = x W1ᵀ + b1, h = relu(a1), a2 = h W2ᵀ + b2. ∂a is short for ∂loss/∂a, ⊙ multiplies entry by
    entry, and [a1 > 0] is 1 where that is true and 0 elsewhere.
    ∂a2 = (σ(a2) - y) / (B K),  ∂W2 = ∂a2ᵀ h + λ W2,  ∂b2 = Σ_B ∂a2,
    ∂a1 = (∂a2 W2) ⊙ [a1 > 0],  ∂W1 = ∂a1ᵀ x + λ W1,  ∂b1 = Σ_B ∂a1,  ∂x = ∂a1 W1."""
    a1 = x @ w1.T + b1
    h = a1.clamp(min=0)
    a2 = h @ w2.T + b2
    d_a2 = (a2.sigmoid() - y) / y.numel()
    d_a1 = (d_a2 @ w2) * (a1 > 0)
    return {"W1": d_a1.T @ x + lam * w1, "b1": d_a1.sum(dim=0),
            "W2": d_a2.T @ h + lam * w2, "b2": d_a2.sum(dim=0), "x": d_a1 @ w1}


@refuted
def mlp_grads_():
    """The regulariser λ/2 ‖W‖_F² has the gradient λ ‖W‖_F.

    The course wrote it so. The gradient is λ W, which has an entry for each weight. ‖W‖_F, the root
    of the sum of all squared entries, is one number."""
    w, lam = normal(3, 4), 0.1
    right = gradient(lambda w: lam / 2 * w.pow(2).sum(), w)
    as_number, as_matrix = ((right - r).abs().max().item() for r in (lam * w.norm(), lam * w))
    return ("difference 0", f"{as_number:.2f} (with λ W: {as_matrix:.0e})",
            as_matrix <= ROUNDING < as_number)


@holds
def mlp_backprop():
    """The gradients of a two-layer network with binary cross-entropy and λ/2 ‖W‖², written out.

    mlp_grads has them for W1, b1, W2, b2 and x, with λ W. They must agree with autograd. The course
    leaves two things out. Its output is W2 φ(W1 x + b1) + b2 without a sigmoid, any number, but the
    loss takes the logs of y and 1 - y, which exist only between 0 and 1. And its products lack the
    transposes, without which the shapes do not fit."""
    x, y = normal(60, 5), torch.randint(2, (60, 1)).double()
    parameters = normal(16, 5), normal(16), normal(1, 16), normal(1)  # W1, b1, W2, b2
    by_autograd = gradient(lambda x, *p: mlp_loss(x, y, *p, 0.1), x, *parameters)
    by_hand = mlp_grads(x, y, *parameters, lam=0.1)
    w1, b1, w2, b2 = parameters
    output = torch.relu(x @ w1.T + b1) @ w2.T + b2
    no_log = ((output <= 0) | (output >= 1)).sum().item()
    return equal(*zip(by_autograd, (by_hand[name] for name in ("x", "W1", "b1", "W2", "b2"))),
                 note=f"no σ: no log for {no_log} of 60", and_also=no_log > 0)


def numeric_grad(f, x, eps=6e-6):
    """Central differences: ∂f/∂x_i ≈ (f(x + eps e_i) - f(x - eps e_i)) / (2 eps), for all i.

    f: tensor like x -> scalar; x: float64, any shape and memory layout; it is not changed. Returns
    a tensor of x's shape, without a graph. Two calls of f for each entry. The error is
    about eps² |f'''| / 6 + 2e-16 |f| / eps: smallest near eps = (2e-16)^(1/3) = 6e-6. Raises
    ValueError for an x of another type: in float32 the difference is lost in rounding."""
    if x.dtype != torch.float64:
        raise ValueError(f"x is {x.dtype}: differences need float64, x.double()")
    x, grad = x.detach(), x.new_zeros(x.shape)  # contiguous, as view needs; zeros_like may not be
    for i in range(x.numel()):
        step = x.new_zeros(x.shape)
        step.view(-1)[i] = eps
        grad.view(-1)[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return grad


def difference_errors(x, powers):
    """Mean error of forward and central differences of Σ exp(sin x), for each eps = 10^power."""
    def f(x):
        return x.sin().exp()

    exact = x.cos() * f(x)
    errors = []
    for eps in (10.0 ** p for p in powers):
        forward = (f(x + eps) - f(x)) / eps
        central = (f(x + eps) - f(x - eps)) / (2 * eps)
        errors.append([(d - exact).abs().mean().item() for d in (forward, central)])
    return torch.tensor(errors)  # [powers, 2]


@holds
def numeric_grad_():
    """Central differences match autograd; the best eps is near 1e-8 forward, 6e-6 central.

    The course says yes. Two errors add up: cutting the Taylor series costs eps (forward) or eps²
    (central), rounding costs 2e-16 / eps. The sum is smallest near (2e-16)^(1/2) or ^(1/3)."""
    x = normal(50)
    by_autograd = gradient(lambda x: x.sin().exp().sum(), x)
    difference = (numeric_grad(lambda x: x.sin().exp().sum(), x) - by_autograd).abs().max().item()
    powers = [-12 + 0.25 * i for i in range(45)]
    forward, central = (powers[i] for i in difference_errors(x, powers).argmin(dim=0))
    return ("1e-8, 6e-6", f"{10 ** forward:.0e}, {10 ** central:.0e} (difference {difference:.0e})",
            difference < 1e-8 and abs(forward + 8) < 1.1 and abs(central + 5.2) < 1.1)


@figure("finite_difference", "Finite differences of exp(sin x), float64")
def draw_finite_difference(ax):
    powers = [-12 + 0.1 * i for i in range(121)]
    errors = difference_errors(torch.linspace(-2, 2, 51, dtype=torch.float64), powers)
    for error, name, root in zip(errors.T, ("forward", "central"), (2, 3)):
        line, = ax.loglog([10 ** p for p in powers], error, label=name)
        ax.axvline(2.2e-16 ** (1 / root), color=line.get_color(), linestyle=":",
                   label=f"eps = (2e-16)^(1/{root})")
    ax.set(xlabel="eps", ylabel="mean error of the derivative")


@refuted
def sgd_steps():
    """SGD makes one step per sample in every epoch, "using only one sample or a batch".

    The course defines SGD by one random sample for each step, and mini-batch SGD apart from it. So
    the first half is true: N steps. Only "or a batch" is wrong: with B samples in each it makes
    N / B steps, rounded up."""
    one, many = (len(torch.arange(1000).split(b)) for b in (1, 64))
    return "1000, 1000 steps", f"{one}, {many} steps (B = 1, 64)", (one, many) == (1000, 16)


def batch_gradients(per_sample, b, replace):
    """The mean gradient of every possible batch of b, [number of batches, d]."""
    n = len(per_sample)
    chosen = (itertools.product(range(n), repeat=b) if replace
              else itertools.combinations(range(n), b))
    return torch.stack([per_sample[list(batch)].mean(dim=0) for batch in chosen])


@holds
def sgd_unbiased():
    """The mini-batch gradient is unbiased; its variance is σ²/B, times (N - B)/(N - 1) if drawn
    without replacement.

    σ² is the variance of the gradients of single samples, for each weight. The check lists all
    batches of B = 1, 2, 3 out of N = 6 samples, for both ways of drawing. The next claim needs
    it."""
    x, y, w = normal(6, 3), normal(6), normal(3)
    per_sample = torch.stack([gradient(lambda w: (xi @ w - yi) ** 2, w) for xi, yi in zip(x, y)])
    full = gradient(lambda w: ((x @ w - y) ** 2).mean(), w)
    variance = per_sample.var(dim=0, correction=0)
    pairs = []
    for b, replace in itertools.product((1, 2, 3), (True, False)):
        batches = batch_gradients(per_sample, b, replace)
        pairs += [(batches.mean(dim=0), full),
                  (batches.var(dim=0, correction=0),
                   variance / b * (1 if replace else (6 - b) / 5))]
    return equal(*pairs)


@refuted
def sgd_below_gd():
    """The variance of SGD's gradient is below that of full gradient descent.

    The course says that this is false, and it is: there is only one batch of all samples, so the
    full gradient has no sampling variance at all."""
    per_sample = normal(6, 3)  # random numbers in place of gradients: the values do not matter
    sgd, gd = (batch_gradients(per_sample, b, replace=False).var(dim=0, correction=0).sum().item()
               for b in (2, 6))
    return "SGD < GD", f"{sgd:.3f} > {gd:.3f}", sgd > gd == 0


@refuted
def gd_memory():
    """Full gradient descent needs all samples in memory at once.

    The course asks about its memory. The gradient of a mean is the mean of gradients, so the parts
    of the data can come one after the other, and their gradients add up, each with its share. What
    the full gradient costs is time: all N samples for one step."""
    x, y, w = normal(60, 3), normal(60), normal(3)

    def grad(x, y):
        return gradient(lambda w: ((x @ w - y) ** 2).mean(), w)

    parts = list(zip(x.split(16), y.split(16)))
    in_parts = sum(len(part) / 60 * grad(part, target) for part, target in parts)
    most = max(len(part) for part, _ in parts)
    difference = (in_parts - grad(x, y)).abs().max().item()
    return ("60 samples at once", f"{most} (difference {difference:.0e})",
            most < 60 and difference <= ROUNDING)


def steps_to(target, batch, rates, limit=2000):
    """Fewest SGD steps to loss <= target on least squares with noise, over all `rates`.

    y = x.w* + noise; x has 10 coordinates with variances from 1 to 0.1, the noise has the standard
    deviation 0.5. The loss, less its lowest possible value, is the mean of 200 independent runs for
    each rate, all at once. A divergent rate never gets there."""
    variance = torch.logspace(0, -1, 10, dtype=torch.float64)     # [10]
    error = torch.ones(len(rates), 200, 10, dtype=torch.float64)  # w - w*: [rates, runs, 10]
    rates = torch.tensor(rates, dtype=torch.float64)[:, None, None]
    for step in range(1, limit + 1):
        x = normal(200, batch, 10) * variance.sqrt()              # [runs, batch, 10]
        residual = torch.einsum("sbd,rsd->rsb", x, error) - 0.5 * normal(200, batch)
        error -= rates * torch.einsum("rsb,sbd->rsd", residual, x) / batch
        if ((error ** 2 * variance).sum(dim=2).mean(dim=1) / 2).min() <= target:
            return step
    return limit


@holds
def batch_doubling():
    """Twice the batch: fewer iterations to the same loss, about half as many while noise rules.

    The course says "decrease", which is right. Each batch size gets its best rate. While noise
    limits the rate, doubling the batch halves the steps. Later the curvature limits it, and
    doubling gains little."""
    rates = [0.02 * 1.3 ** i for i in range(16)]
    a, b, c, d = (steps_to(0.01, batch, rates) for batch in (4, 8, 128, 256))
    return ("fewer, ratio 0.5 -> 1", f"4, 8: {a}, {b} steps; 128, 256: {c}, {d}",
            a > b > c >= d and 0.4 < b / a < 0.6 and d / c > 0.7)


@refuted
def gd_global():
    """Gradient descent reaches the global minimum, SGD a local one.

    The course says that this is false, and it is. The double well f(x) = (x² - 1)² + 0.3 x has its
    lower well on the left: f(-1) = -0.3. Gradient descent from 1.5 ends in the one on the right.
    Noise is a way out of it, SGD's or, as here in 1,000 runs, a normal one on each gradient."""
    def ends(noise, runs):
        x = torch.full((runs,), 1.5, dtype=torch.float64)
        for _ in range(300):
            x = x - 0.02 * (gradient(lambda x: f(x).sum(), x) + noise * normal(runs))
        return x

    def f(x):
        return (x ** 2 - 1) ** 2 + 0.3 * x

    x, lower = ends(0, 1).item(), f(-1.0)
    escaped = (ends(10, 1000) < 0).double().mean().item()
    return (f"{lower:g} or lower", f"{f(x):.3g}, at x = {x:.2f} (with noise: {escaped:.0%} left)",
            f(x) > lower + 0.1 and escaped > 0.3)


@refuted
def gd_no_slope():
    """Gradient descent can minimise any loss.

    The course asks where it cannot be used: where no gradient shows the way. The share of wrong
    answers is flat with jumps, so its gradient is 0, even for the worst weights of all. A smooth
    loss stands in for it. (The gradient of a choice, or of a word that G draws, is 0 as well.)"""
    x, w = normal(100, 3), normal(3)
    y = (x @ w).sign()  # right answers 1 and -1

    def wrong(w):
        return (1 - y * (x @ w).sign()).mean() / 2

    flat, smooth = (gradient(f, -w).norm().item()
                    for f in (wrong, lambda w: F.softplus(-y * (x @ w)).mean()))
    share = wrong(-w).item()
    return ("a gradient", f"{share:.0%} wrong, gradient {flat:g} (cross-entropy: {smooth:.2f})",
            share == 1 and flat == 0 and smooth > 0.01)


@refuted
def newton_ravine():
    """Momentum beats Newton in a narrow ravine.

    The course says yes, because Newton's steps cost more and end in saddle points. Both are true,
    but in a ravine that is a quadratic, however narrow, Newton needs one step. Momentum with its
    best settings (Polyak 1964) makes errors smaller by (√κ - 1) / (√κ + 1) a step in the long run,
    if the curvatures differ by a factor κ. An error ε takes √κ / 2 log(1/ε) steps, and some more,
    as errors grow at first: 218 and 103 more for κ = 1000, ε = 1e-6. Newton's step solves d
    equations, d³/3 products, where the others multiply with the Hessian, d²: its one step costs
    more than 321 of those from d = 963 on, and a network has millions of weights. On the saddle
    (x² - y²)/2 Newton's step ends in the middle, and plain gradient descent leaves it."""
    def newton(h, x):
        return x - torch.linalg.solve(torch.diag(h), h * x)

    h, start = double([1.0, 1000.0]), double([1.0, 1.0])  # f = Σ h x² / 2
    root_low, root_high = h.sqrt()
    momentum = ((root_high - root_low) / (root_high + root_low)) ** 2
    rate = 4 / (root_high + root_low) ** 2
    x, v, steps = start, 0 * start, 0
    while x.norm() > 1e-6:
        v = momentum * v - rate * h * x
        x, steps = x + v, steps + 1
    saddle, near = double([1.0, -1.0]), double([1.0, 1e-3])
    stuck = newton(saddle, near).norm().item()
    away = ((1 - 0.1 * saddle) ** 100 * near).norm().item()  # 100 steps of rate 0.1
    return ("momentum in fewer steps", f"momentum {steps}, Newton 1 (saddle: Newton {stuck:g}, "
            f"descent {away:.0f} away)",
            steps > 1 and newton(h, start).norm() <= 1e-6 and stuck <= 1e-6 and away > 10)


def ridge(x, y, lam):
    """argmin_w ‖x w - y‖² + λ ‖w‖² = (xᵀx + λI)⁻¹ xᵀy, [d], for x [n, d], y [n] and λ > 0."""
    return torch.linalg.solve(x.T @ x + lam * torch.eye(x.shape[1]).to(x), x.T @ y)


@refuted
def bilevel():
    """The inner problem of a bilevel problem must be solved by gradient descent.

    The course asked, without an answer. Outer problem: the best λ of ridge regression for held-out
    data; inner problem: its weights w, in closed form. They solve it if xᵀ(x w - y) + λ w = 0, and
    then dw/dλ = -(xᵀx + λI)⁻¹ w. So the outer gradient is exact, as central differences confirm."""
    x, y, held_x, held_y = normal(20, 4), normal(20), normal(10, 4), normal(10)
    lam = double(0.7)
    w = ridge(x, y, lam)
    inner = gradient(lambda w: ((x @ w - y) ** 2).sum() + lam * (w ** 2).sum(), w).norm()
    solved = (inner <= ROUNDING * (x.T @ y).norm()).item()
    dw = -torch.linalg.solve(x.T @ x + lam * torch.eye(4).to(x), w)
    exact = 2 * (held_x @ w - held_y) @ (held_x @ dw)
    measured = numeric_grad(lambda lam: ((held_x @ ridge(x, y, lam) - held_y) ** 2).sum(), lam)
    error = abs((exact - measured) / exact).item()
    return ("no exact gradient otherwise", f"exact: relative error {error:.0e}",
            solved and error <= 1e-5)


def rnn(inputs, w_x, w_h, truncate=None):
    """States h_t = tanh(W_x x_t + W_h h_{t-1}), h_{-1} = 0, t = 0..T-1; returns the last one, [H].

    inputs [T, d], w_x [H, d], w_h [H, H]. truncate = S, 1 to T: the last state's gradient flows
    through the last S steps only, and is 0 for all inputs before them. The state stays the same."""
    h = torch.zeros(len(w_h)).to(inputs)
    for t, x in enumerate(inputs):
        if truncate is not None and t == len(inputs) - truncate:
            h = h.detach()
        h = torch.tanh(w_x @ x + w_h @ h)
    return h


@holds
def tbptt():
    """Truncating backpropagation through time at S steps cuts the gradient, and only the gradient.

    The states stay the same. The gradient of the last one becomes zero for inputs more than S steps
    back, where it was not, and stays the same for the others. The last input is 1 step back."""
    x, w_x, w_h, s = normal(12, 3), normal(4, 3), normal(4, 4) / 2, 5
    full, cut = (gradient(lambda x: rnn(x, w_x, w_h, truncate).sum(), x) for truncate in (None, s))
    return equal((rnn(x, w_x, w_h), rnn(x, w_x, w_h, s)), (cut[-s:], full[-s:]),
                 (cut[:-s], 0), and_also=(full[:-s] != 0).any())


@refuted
def tbptt_reach():
    """With truncation at S steps the network can only use relations at most S steps apart.

    This is right for the gradient and wrong for the state. Here W_h = I and the numbers are small,
    so that tanh hardly bends: the network remembers. With S = 5 the last state still moves with the
    first input, 12 steps back, nearly as far as the first state does. Its gradient there is 0."""
    x, w_x, w_h = normal(12, 3) / 10, normal(8, 3) / 20, torch.eye(8, dtype=torch.float64)
    other = x.clone()
    other[0] += 1
    first, last = ((rnn(other[:n], w_x, w_h, 5) - rnn(x[:n], w_x, w_h, 5)).norm().item()
                   for n in (1, 12))
    slope = gradient(lambda x: rnn(x, w_x, w_h, 5).sum(), x)[0].norm().item()
    return ("state moves by 0", f"by {last:.2g} (first state: {first:.2g}; gradient {slope:g})",
            last > 0.5 * first > 0.01 and slope == 0)


def moments(z):
    """Mean, variance and kurtosis (3 for a normal) of each column of z [B, d]: three [d].

    The variance is the mean of (z - mean)², the kurtosis that of (z - mean)⁴ over variance². A
    constant column has the variance 0 and the kurtosis nan, also where its mean is rounded and
    z - mean not 0."""
    centred = torch.where((z == z[0]).all(dim=0), 0.0, z - z.mean(dim=0))
    variance = centred.pow(2).mean(dim=0)
    return z.mean(dim=0), variance, centred.pow(4).mean(dim=0) / variance ** 2


def moment_training(optimiser, rate, zeroed, steps):
    """Losses of a linear map in training; its outputs shall have mean 0, variance 1, kurtosis 3.

    zeroed: whether the gradients are set to zero before each step."""
    x, w = 2 * torch.rand(256, 8).double(), torch.randn(8, 4).double() / 8 ** 0.5
    b = torch.zeros(4).double()
    w, b = w.requires_grad_(), b.requires_grad_()
    opt = optimiser([w, b], lr=rate)
    losses = []
    for _ in range(steps):
        mean, variance, kurtosis = moments(x @ w + b)
        loss = (mean ** 2 + (variance - 1) ** 2 + (kurtosis - 3) ** 2).mean() / 3
        if zeroed:
            opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@holds
def grad_accumulate():
    """With Adam, not zeroing the gradients makes the loss grow and grow.

    The course saw it with this loss, and says "without bound". Each step uses the sum of all
    gradients so far, which Adam scales to a step of full length. In 300 steps here the loss must be
    highest in their second half, above 3 times its first value; with zeroed gradients it must fall
    under 0.1."""
    zeroed = moment_training(torch.optim.Adam, 0.01, True, 300)
    summed = double(moment_training(torch.optim.Adam, 0.01, False, 300))
    first, early, late = (part.max().item() for part in (summed[0], summed[:150], summed[150:]))
    return ("grows", f"{first:.2g}, {early:.2g}, {late:.2g} (zeroed: {zeroed[-1]:.0e})",
            late > early > first and late > 3 * first and zeroed[-1] < 0.1)


@refuted
def grad_accumulate_sgd():
    """Not zeroing the gradients makes the loss grow and grow with plain gradient descent, too.

    Using the sum of all gradients is momentum with factor 1. The weights swing like a ball without
    friction as long as rate · curvature < 4; above it they do run away, as the check shows for
    x²/2. At rate 0.5 the loss does not grow here."""
    def largest(rate):  # |x| in 100 steps on x²/2, whose curvature is 1
        x, total, seen = 1.0, 0.0, 1.0
        for _ in range(100):
            total += x
            x -= rate * total
            seen = max(seen, abs(x))
        return seen

    losses = double(moment_training(torch.optim.SGD, 0.5, False, 600))
    first, early, late = (part.max().item() for part in (losses[0], losses[:200], losses[400:]))
    below, above = largest(3.9), largest(4.1)
    return ("grows", f"{first:.2g}, {early:.2g}, {late:.2g}: swings (x²/2: 3.9 {below:.2g}, "
            f"4.1 {above:.0e})", late <= 2 * early < math.inf and below < 10 < 1e12 < above)


# A variable with these three values and probabilities has a normal's first five moments, so E f
# is a sum of few terms, and the same as a normal's for polynomials f up to order five.
THREE_POINTS = (-3 ** 0.5, 0.0, 3 ** 0.5)
THREE_WEIGHTS = (1 / 6, 2 / 3, 1 / 6)


def noise_parts(loss, D, x):
    """½ L'' ‖∇D‖² and ½ L' ΔD at x [B, d], [B] each: E L(D(x + s e)) = L(D(x)) + s² (their sum) +
    O(s⁴) for noise e of mean 0, covariance I and no third moments. ΔD = Σ_i ∂²D/∂x_i².

    loss: number -> number; D: [d] -> number; both smooth."""
    d = vmap(D)(x)
    slope, bend = vmap(jacrev(D))(x), vmap(jacrev(jacrev(D)))(x)
    first, second = vmap(jacrev(loss))(d), vmap(jacrev(jacrev(loss)))(d)
    laplacian = bend.diagonal(dim1=1, dim2=2).sum(dim=1)
    return second * slope.pow(2).sum(dim=1) / 2, first * laplacian / 2


@refuted
def grad_norm_noise():
    """Noise of variance s² on D's input is a gradient penalty.

    The course quotes this. Bishop 1995 shows it, to second order, for a squared error at its
    minimum, where L' averages to 0. In general the noise adds s²/2 (L'' ‖∇D‖² + L' ΔD) to a loss
    L(D), and only the first part is a penalty. For a GAN's loss, here L = -log σ(D), the second one
    counts: at many of 100 points the noise *lowers* the loss, which no penalty does. Expectations
    are exact. What both parts leave must be of order s⁴: 16 times less when s halves."""
    w, v, x = normal(5, 2), normal(5), normal(100, 2)

    def D(x):
        return torch.tanh(x @ w.T) @ v

    def loss(d):
        return F.softplus(-d)

    e = double(list(itertools.product(THREE_POINTS, repeat=2)))  # [9, 2], for s = 1
    probability = double(list(itertools.product(THREE_WEIGHTS, repeat=2))).prod(dim=1)

    def added(s):
        return loss(D(x[:, None] + s * e)) @ probability - loss(D(x))  # [100]

    penalty, rest = noise_parts(loss, D, x)
    coarse, fine = ((added(s) - s ** 2 * (penalty + rest)).abs().sum() for s in (0.004, 0.002))
    fit, no_rest = noise_parts(lambda d: (d - D(x[0])) ** 2, D, x[:1])  # a squared error of 0
    lower = (added(0.002) < 0).sum().item()
    return ("loss lower at 0 of 100",
            f"at {lower} (both parts leave {coarse / fine:.1f} times less)",
            lower > 10 and abs(coarse - 16 * fine) <= fine and (penalty >= 0).all().item()
            and abs(no_rest.item()) < ROUNDING < fit.item())


# --- flows and autoencoders --------------------------------------------------------------------

topic("flows and autoencoders", """
    Three ways to give each picture x a code z. A flow maps codes to pictures by an invertible
    function, so the density of x can be computed. GLO learns one free code for each picture. A
    variational autoencoder (VAE) learns q(z given x), a distribution of codes for each picture.
    The question is always what is known about the codes: only then can new ones be drawn.""")


def coupling_log_prob(x, layers):
    """log p(x) = log N(z; 0, I) + log |det ∂z/∂x|, z = M⁻¹(x), in nats, for x [B, d]: [B].

    layers of M from z to x: (mask, scale, shift), mask a 0/1 tensor [d], scale and shift functions
    [B, d] -> [B, d] of the coordinates that the mask keeps (Dinh et al. 2017, section 3):
    x = mask z + (1 - mask)(z exp(scale(mask z)) + shift(mask z)),
    log |det ∂z/∂x| = -Σ (1 - mask) scale(mask x), summed over the layers. There may be none."""
    log_det = 0
    for mask, scale, shift in reversed(layers):  # one layer back: from x towards z
        kept = mask * x
        s = (1 - mask) * scale(kept)
        x = kept + (1 - mask) * (x - shift(kept)) * (-s).exp()
        log_det = log_det - s.sum(dim=1)
    return log_det - (x ** 2).sum(dim=1) / 2 - x.shape[1] / 2 * math.log(2 * math.pi)


def random_coupling(d, depth):
    """Coupling layers with one-layer tanh nets; the mask keeps even and odd coordinates in turn."""
    def net():
        w, b = normal(d, d) / d ** 0.5, 0.5 * normal(d)
        return lambda x: torch.tanh(x @ w.T + b) / 2

    return [((torch.arange(d) + i) % 2, net(), net()) for i in range(depth)]


@holds
def change_of_variables():
    """log p(x) = log p_z(M⁻¹(x)) + log |det ∂M⁻¹/∂x| for a stack of invertible maps.

    The course says yes. M is four coupling layers in the plane. The Jacobian of each is triangular,
    so its log determinant is a sum. The density is summed over a square in cells of 0.1 x 0.1."""
    layers = random_coupling(2, 4)

    def M(z):
        for mask, scale, shift in layers:
            z = mask * z + (1 - mask) * (z * scale(mask * z).exp() + shift(mask * z))
        return z

    z = normal(3, 2)
    jacobians = torch.stack([torch.autograd.functional.jacobian(M, one) for one in z])
    by_autograd = -(z ** 2).sum(dim=1) / 2 - math.log(2 * math.pi) - jacobians.det().abs().log()
    difference = (coupling_log_prob(M(z), layers) - by_autograd).abs().max()
    line = torch.linspace(-20, 20, 401, dtype=torch.float64)
    p = coupling_log_prob(torch.cartesian_prod(line, line), layers).exp()
    return agree(1, p.sum().item() * 0.1 ** 2, "in all", tolerance=1e-6,
                 and_also=difference <= ROUNDING)


@holds
def glo_no_prior():
    """In GLO, where each picture has its own learned code, G(z) of a normal z is no sample.

    The course says yes. Nothing ties the codes to a distribution (Bojanowski et al. 2018 fit a
    Gaussian to them afterwards). Here the pictures are 512 points of a ring of 8 modes. After 400
    steps the check measures how many of G's points lie within 3 standard deviations of a mode."""
    centres = common.ring()
    x = common.gaussian_mixture(centres, 0.05, 512)
    G = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    codes = torch.randn(512, 2, requires_grad=True)
    opt = torch.optim.Adam([{"params": [codes], "lr": 1e-2},
                            {"params": G.parameters(), "lr": 3e-3}])
    for _ in range(400):
        loss = (G(codes) - x).pow(2).sum(dim=1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    own, drawn = ((torch.cdist(G(z), centres).min(dim=1).values < 0.15).float().mean().item()
                  for z in (codes, torch.randn(4000, 2)))
    return "far apart", f"learned codes {own:.0%}, normal z {drawn:.0%}", own > 0.8 and drawn < 0.3


def kl_standard_normal(mu, sigma):
    """KL(N(mu, Σ) ‖ N(0, I)) = (tr Σ + ‖mu‖² - d - log det Σ) / 2, nats; mu [d], sigma [d, d].

    KL(q ‖ p) is E_q (log q - log p). tr, the trace, is the sum of the diagonal."""
    return (sigma.trace() + mu @ mu - len(mu) - torch.logdet(sigma)) / 2


def log_normal(x, mu, sigma):
    """log N(x; mu, Σ), nats; x, mu [d], sigma [d, d]."""
    d = x - mu
    return -(d @ torch.linalg.solve(sigma, d) + torch.logdet(2 * math.pi * sigma)) / 2


def random_covariance(d):
    """A random symmetric matrix with eigenvalues of 0.1 and more."""
    a = normal(d, d)
    return a @ a.T / d + 0.1 * torch.eye(d).to(a)


def linear_vae():
    """p(z) = N(0, I), p(x given z) = N(w z, v I): returns x, w, v and the exact posterior of z.

    The posterior p(z given x) is N(mu, Σ): Σ = (I + wᵀw / v)⁻¹, mu = Σ wᵀx / v."""
    w, v = normal(5, 2), 0.3
    x = w @ normal(2) + v ** 0.5 * normal(5)
    cov = torch.linalg.inv(torch.eye(2).to(w) + w.T @ w / v)
    return x, w, v, cov @ w.T @ x / v, cov


def linear_elbo(x, w, v, mu, cov):
    """E_q log p(x given z) - KL(q ‖ p(z)), q = N(mu, Σ), of the linear VAE; closed form, nats."""
    fit = ((x - w @ mu) ** 2).sum() + (w @ cov @ w.T).trace()  # E_q ‖x - w z‖²
    return -(fit / v + len(x) * math.log(2 * math.pi * v)) / 2 - kl_standard_normal(mu, cov)


@holds
def vae_elbo():
    """A VAE minimises an upper bound of -log p(x), which is reached at the true posterior.

    The bound is -ELBO, and log p(x) - ELBO = KL(q ‖ p(z given x)) >= 0 (Kingma, Welling 2014, eqs.
    1 to 3). In a linear VAE both sides are in closed form. Why maximise p(x), the evidence? It is
    what the model gives to a picture that was seen, and the model with the largest mean log p(x) is
    the one with the smallest KL(data ‖ model)."""
    x, w, v, mu, cov = linear_vae()
    log_p = log_normal(x, torch.zeros_like(x), w @ w.T + v * torch.eye(5).to(w))
    at_posterior = (log_p - linear_elbo(x, w, v, mu, cov)).item()
    gaps = [(log_p - linear_elbo(x, w, v, mu + normal(2), random_covariance(2))).item()
            for _ in range(100)]
    return ("gap > 0; 0 at posterior",
            f"{min(gaps):.2f} to {max(gaps):.0f}; {at_posterior:.0e}",
            all(gap > 0 for gap in gaps) and abs(at_posterior) < ROUNDING)


@refuted
def vae_posterior():
    """q(z given x) is N(0, I), and encoding a picture twice gives the same picture.

    The course asked, without an answer. Both are wrong. N(0, I) is the prior: what z is before x is
    seen. And z is drawn, so the same x twice gives two z and two pictures."""
    x, w, v, mu, cov = linear_vae()  # q is the exact posterior
    root = torch.linalg.cholesky(cov)
    one, two = (w @ (mu + root @ normal(2)) for _ in range(2))
    kl, apart = kl_standard_normal(mu, cov).item(), (one - two).norm().item()
    return ("KL 0, pictures 0 apart", f"KL {kl:.2f} nats, {apart:.2f} apart",
            kl > ROUNDING and apart > ROUNDING)


def best_linear_vae(variance, v):
    """The w >= 0 of the largest mean ELBO for data x of mean 0 and that variance; KL(q ‖ prior).

    p(x given z) = N(w z, v), and q is the true posterior. The ELBO is quadratic in x, so the mean
    over x = ±√variance is exact. w: the best of 0, 0.05, ..., 3."""
    one, x = double([1.0]), double([variance ** 0.5])  # the mean is the same for x and -x
    found = []
    for w in torch.linspace(0, 3, 61, dtype=torch.float64):
        cov = one[:, None] * v / (v + w ** 2)
        mu = w * x / (v + w ** 2)
        elbo = linear_elbo(x, w * one[:, None], v, mu, cov).item()
        found.append((elbo, w.item(), kl_standard_normal(mu, cov).item()))
    return max(found)[1:]


@holds
def posterior_collapse():
    """If a VAE's decoder expects more noise v than the data has variance s², its code says nothing.

    This is posterior collapse: q(z given x) is the prior for every x, the KL is 0, and the decoder
    draws the mean. In a VAE with one code and one pixel the best weight is w² = s² - v, or 0 if
    s² < v (Lucas et al. 2019), and the mean KL, what the code says, is log(s²/v)/2. So a smaller v
    (chapter 01: x_sigma2) is a cure, and so is a smaller weight of the KL."""
    (w, kl), (w_collapsed, kl_collapsed) = (best_linear_vae(1.0, v) for v in (0.36, 1.5))
    return ("0.5108 nats; 0 for v > s²", f"{kl:.4f}; {kl_collapsed:.2g}",
            abs(w - 0.8) < 1e-9 and abs(kl - math.log(1 / 0.36) / 2) < ROUNDING
            and w_collapsed == 0 and abs(kl_collapsed) < ROUNDING)


def picture_error(x, answer):
    """Mean squared distance of the pictures x [n, pixels] to one answer [pixels]."""
    return (x - answer).pow(2).sum(dim=1).mean()


@holds
def vae_mean():
    """If several pictures fit one code, a VAE's best answer is their mean, which is a blur.

    Squared error and cross-entropy are convex, and have their gradient 0 at the mean. (An absolute
    error is least at the median.) Any one of the pictures, drawn at random, has twice the squared
    error. A GAN avoids the mean: D can see that it is not among the data."""
    x = torch.rand(5, 784, dtype=torch.float64)  # five pictures that fit one code
    mean = x.mean(dim=0)
    slopes = [gradient(f, mean).abs().max().item() for f in (
        lambda a: picture_error(x, a), lambda a: F.binary_cross_entropy(a.expand(5, -1), x))]
    errors = [picture_error(x, one).item() for one in (mean, *x)]
    return agree(2, sum(errors[1:]) / 5 / errors[0], "times the error", note="slope {:.0e}".format(
        max(slopes)), and_also=max(slopes) < ROUNDING < (x - mean).norm(dim=1).min())


@holds
def kl_closed_form():
    """KL(N(mu, Σ) ‖ N(0, I)) = (tr Σ + ‖mu‖² - d - log det Σ) / 2.

    The course says yes; its loss leaves the 1/2 out and so takes twice the KL. The other side is
    the mean of log q - log p, q = N(mu, Σ). Both logs are quadratic, so the mean over the 2d points
    mu ± √d L_i is exact (L_i: column i of the Cholesky factor). An encoder gives log σ², because
    any number is the log of a variance, so nothing has to keep σ² above 0."""
    mu, cov = normal(3), random_covariance(3)
    steps = 3 ** 0.5 * torch.linalg.cholesky(cov).T  # row i is √d L_i
    zero, one = torch.zeros_like(mu), torch.eye(3).to(mu)
    mean = sum(log_normal(z, mu, cov) - log_normal(z, zero, one)
               for z in torch.cat([mu + steps, mu - steps])) / 6
    return agree(mean.item(), kl_standard_normal(mu, cov).item(), "nats")


# --- GANs --------------------------------------------------------------------------------------

topic("GANs", """
    A GAN is a game: the generator G turns noise z into pictures, the discriminator D says how
    likely a picture is real, and each is trained against the other. D's answer is σ(a), the
    sigmoid of a number a, its logit. The claims ask what a perfect D measures, what gradient it
    gives to G, how a game that is played by gradient steps moves, and what other critics measure
    when D is too sure. p is the distribution of the data, q that of G's pictures.""")


def jensen_shannon(p, q):
    """JSD = KL(p ‖ m)/2 + KL(q ‖ m)/2, m = (p + q)/2; nats, 0 to log 2; p, q [n] sum to 1.

    Where p or q is 0, its term is 0. Raises ValueError if the shapes differ."""
    if p.shape != q.shape:
        raise ValueError(f"p {tuple(p.shape)} and q {tuple(q.shape)} differ")
    m = (p + q) / 2  # xlogy(a, b) is a log b, and 0 where a is 0
    return (torch.special.xlogy(p, p) + torch.special.xlogy(q, q)
            - torch.special.xlogy(2 * m, m)).sum() / 2


def gan_value(D, p, q):
    """V(D) = E_p log D + E_q log(1 - D), D, p, q [n] (Goodfellow et al. 2014, eq. 1); nats.

    Where p or q is 0, its term is 0, also if D is sure. Raises ValueError if the shapes differ."""
    if not D.shape == p.shape == q.shape:
        raise ValueError(f"D {tuple(D.shape)}, p {tuple(p.shape)} and q {tuple(q.shape)} differ")
    return (torch.special.xlogy(p, D) + torch.special.xlogy(q, 1 - D)).sum()


@holds
def optimal_d():
    """D* = p / (p + q) maximises V, and V(D*) = 2 JSD(p, q) - log 4.

    Goodfellow et al. 2014, prop. 1 and thm. 1. V (gan_value) is concave in D, so D* is best if the
    gradient vanishes there; 100 other D's must do worse."""
    p, q = normal(6).softmax(0), normal(6).softmax(0)
    best = p / (p + q)
    value = gan_value(best, p, q)
    others = torch.stack([gan_value(torch.rand(6, dtype=torch.float64), p, q) for _ in range(100)])
    return equal((value, 2 * jensen_shannon(p, q) - math.log(4)),
                 (gradient(lambda D: gan_value(D, p, q), best), 0), and_also=(others < value).all())


@refuted
def perfect_d():
    """At p = q, with a perfect D, more training still improves G.

    No report states this; it is what one would train on for. But D* is then 1/2 everywhere
    (Goodfellow et al. 2014, prop. 1), and with this D, V is -log 4 for every q, so its gradient for
    G is zero. For p ≠ q it is not."""
    logits, other = normal(6), normal(6)  # the logits of q stand for G's weights

    def grad_g(p):
        D = p / (p + logits.softmax(0))
        return gradient(lambda a: gan_value(D, p, a.softmax(0)), logits).norm().item()

    at_equilibrium, before = grad_g(logits.softmax(0)), grad_g(other.softmax(0))
    return ("gradient for G", f"{at_equilibrium:.0e} (p ≠ q: {before:.2f})",
            at_equilibrium <= ROUNDING < before)


@refuted
def detach_d():
    """Training D needs backpropagation into G.

    The course asked, without an answer. D's gradient is the same with G(z).detach(), to the last
    bit, so the way back through G is only wasted time. G's step is the other half: its gradient
    comes through D, so there G(z) keeps its graph, and detached nothing of G could learn. Pictures
    that are only looked at need no graph at all: torch.no_grad()."""
    G, D = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
    z = normal(8, 3)

    def grads(x_fake):  # of D's weights and, if a way leads there, of G's
        return torch.autograd.grad(F.softplus(D(x_fake)).mean(), [D.weight, G.weight],
                                   allow_unused=True)

    (kept, kept_g), (detached, detached_g) = grads(G(z)), grads(G(z).detach())
    difference = (kept - detached).abs().max().item()
    return ("another gradient", f"difference {difference:g} (G's {kept_g.norm():.2f}, then "
            f"{detached_g})", difference == 0 and detached_g is None and kept_g.norm().item() > 0)


def generator_slopes(a):
    """d loss_G / d a at D's logit a of a fake: minimax log(1 - σ(a)), non-saturating -log σ(a)."""
    minimax = gradient(lambda a: F.logsigmoid(-a).sum(), a)
    nonsaturating = gradient(lambda a: -F.logsigmoid(a).sum(), a)
    return minimax, nonsaturating


@holds
def saturation_low():
    """As D(G(z)) -> 0 the minimax generator's gradient vanishes, the non-saturating one does not.

    The course says yes. In the logit a, which is -20 here, the two are -σ(a) and -(1 - σ(a))."""
    minimax, nonsaturating = (slope.item() for slope in generator_slopes(double(-20.0)))
    D = 1 / (1 + math.exp(20))
    return (f"{-D:.0e}, {-(1 - D):.4f}", f"{minimax:.0e}, {nonsaturating:.4f}",
            abs(minimax + D) < 1e-15 and abs(nonsaturating + 1 - D) < ROUNDING)


@refuted
def saturation_high():
    """As D(G(z)) -> 1 the minimax generator's gradient explodes to -∞.

    The course says -∞. In D's output that is right: -1/(1 - D). But G is reached through the logit
    a, where it is -σ(a) -> -1, because the sigmoid's slope D (1 - D) takes the factor away."""
    in_logit = generator_slopes(double(20.0))[0].item()
    in_output = gradient(lambda D: (1 - D).log(), torch.sigmoid(double(20.0))).item()
    return ("-∞", f"{in_logit:.4f} in the logit ({in_output:.0e} in D)",
            abs(in_logit + 1) < 1e-8 and in_output < -1e8)


@figure("saturation", "Which gradient reaches G?", panels=2)
def draw_saturation(in_logit, in_output):
    a = torch.linspace(-6, 6, 200, dtype=torch.float64)
    D = torch.sigmoid(a)
    for name, slope in zip(("minimax: log(1 - D)", "non-saturating: -log D"), generator_slopes(a)):
        in_logit.plot(D, slope, label=name)
        in_output.plot(D, slope / (D * (1 - D)), label=name)  # undo the sigmoid's slope
    in_logit.set(title="in a: the gradient that reaches G", xlabel="D(G(z))", ylabel="d loss / d a")
    in_output.set(title="in D: explodes at 0 or 1", xlabel="D(G(z))",
                  ylabel="d loss / d D", ylim=(-20, 0))


def binary_entropy(p):
    """H(p) = -p log p - (1 - p) log(1 - p), nats; p in [0, 1], and H is 0 at both ends.

    p and H are numbers. Raises ValueError for a p outside."""
    return sum(-share * math.log(share) for share in (p, 1 - p) if share)


@holds
def smoothing_floor():
    """With real label 0.9 D's loss cannot fall under H(0.9) = 0.3251.

    The course calls it "an asymptotic bound"; the log of its training shows 0.3253. The
    cross-entropy of a label y is H(y) + KL(y ‖ D), smallest at D = y. The part of the fakes is
    >= 0, so the floor holds for the sum."""
    a = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    lowest = F.binary_cross_entropy_with_logits(a, torch.full_like(a, 0.9), reduction="none").min()
    return agree(binary_entropy(0.9), lowest.item(), "nats", tolerance=1e-8)


def smoothed_d(p, q, real=0.9, fake=0.0):
    """D* = (real p + fake q) / (p + q): the best D for those labels of real and fake; p, q [n]."""
    return (real * p + fake * q) / (p + q)


@holds
def smoothing_optimum():
    """With real label α and fake label β the best D is (α p + β q) / (p + q).

    So with β = 0 it is α p / (p + q): 0 where no data is, and all else only scaled. With β > 0 the
    numerator keeps q, and where p = 0, D* is β however much G draws there: D is flat, and G's
    pictures have no way to the data (Salimans et al. 2016). This is why smoothing is one-sided. The
    loss is convex in D: at its minimum the gradient is 0."""
    p, q = normal(6).softmax(0), normal(6).softmax(0)
    pairs = []
    for real, fake in ((0.9, 0.0), (0.9, 0.1)):
        def loss(D):
            return -(p @ (real * D.log() + (1 - real) * (1 - D).log())
                     + q @ (fake * D.log() + (1 - fake) * (1 - D).log()))

        pairs.append((gradient(loss, smoothed_d(p, q, real, fake)), 0))
    return equal(*pairs, (smoothed_d(0 * p, q), 0), (smoothed_d(0 * p, q, fake=0.1), 0.1))


@refuted
def g_loss_alone():
    """While D's loss stays and G's loss falls, G gets better; stop where G's loss is lowest.

    The course asks when to stop. Let q = p, so that nothing is left to learn, and D = σ(b) be the
    same everywhere. At b = 0 the slope of Loss_D in b is 0, that of Loss_G = -log D is -1/2 (in D
    itself -2). So a D that drifts to b = 0.3 changes Loss_D by 2 % and Loss_G by 20 %, with the
    same G. Only both losses together say something, and pictures or a score say more."""
    def losses(b):
        return F.softplus(-b) + F.softplus(b), F.softplus(-b)  # Loss_D: on reals and on fakes

    zero, half = double(0.0), double(0.5)
    slope_d, slope_g = (gradient(lambda b: losses(b)[i], zero).item() for i in range(2))
    in_output = gradient(lambda D: -D.log(), half).item()
    (before_d, before), (after_d, after) = ([loss.item() for loss in losses(double(b))]
                                            for b in (0.0, 0.3))
    return ("G better", f"same G, Loss_G {before:.3f} to {after:.3f} (Loss_D {before_d:.2f} to "
            f"{after_d:.2f})", after < 0.81 * before and abs(after_d / before_d - 1) < 0.02
            and (slope_d, slope_g, in_output) == (0, -0.5, -2))


@holds
def double_sigmoid():
    """A sigmoid applied twice and D saturated freeze the log at Loss_D 1.0064, Loss_G 0.6931.

    A report shows this log, and a report asks why the losses are constant. That this is the cause
    is our inference, because all digits agree. D ends in a sigmoid, which
    says 1 on reals and 0 on fakes, and the loss applies another one: Loss_D = softplus(-1) + log 2,
    Loss_G = log 2. The first sigmoid lets no gradient through."""
    def losses(a):  # a: the logit on reals, -a: on fakes
        real, fake = torch.sigmoid(a), torch.sigmoid(-a)
        return F.softplus(-real) + F.softplus(fake), F.softplus(-fake)

    a = double(40.0)
    loss_d, loss_g = (loss.item() for loss in losses(a))
    slope_d, slope_g = (gradient(lambda a: losses(a)[i], a).item() for i in range(2))
    text = f"{loss_d:.4f}, {loss_g:.4f}"
    return ("1.0064, 0.6931", f"{text} (slopes {slope_d:.0e}, {slope_g:.0e})",
            text == "1.0064, 0.6931" and abs(slope_d) + abs(slope_g) < 1e-12
            and abs(loss_d - math.log(1 + math.exp(-1)) - math.log(2)) < ROUNDING)


@figure("fingerprints", "Two constants in the log of a GAN", panels=2)
def draw_fingerprints(smoothing, twice):
    a = torch.linspace(-6, 8, 300, dtype=torch.float64)
    for label in (1.0, 0.9, 0.7):
        loss = F.binary_cross_entropy_with_logits(a, torch.full_like(a, label), reduction="none")
        line, = smoothing.plot(a, loss, label=f"real label {label}")
        if label < 1:
            smoothing.axhline(binary_entropy(label), color=line.get_color(), linestyle=":")
    smoothing.set(title="no loss below H(label), dotted", ylim=(0, 2),
                  xlabel="D's logit on a real picture", ylabel="D's loss, nats")
    s = a.clamp(min=0)
    for name, f, colour in (("once", lambda a: a, "C0"), ("twice", torch.sigmoid, "C3")):
        twice.plot(s, F.softplus(-f(s)) + F.softplus(f(-s)), colour, label=f"Loss_D, {name}")
        twice.plot(s, F.softplus(-f(-s)), colour, linestyle="--", label=f"Loss_G, {name}")
    twice.set(title="sigmoid twice: 1.0064 and 0.6931", xlim=(0, 8), ylim=(0, 2),
              xlabel="D's logit: +a on reals, -a on fakes", ylabel="loss, nats")


def both_orders(games):
    """max_D min_G V and min_G max_D V, a pair of [n], of games V [n, moves of G, moves of D]."""
    return games.amin(1).amax(1), games.amax(2).amin(1)


@holds
def minimax_maximin():
    """min_G max_D V = max_D min_G V, given that an equilibrium exists.

    The course says so, and with its condition it is right. An equilibrium, or saddle point, is a
    pair of moves from which neither player alone can do better: an entry that is the smallest of
    its column (G chooses the row) and the largest of its row. The check finds them in 1000 random
    games: exactly where there is one, both sides are equal. Matching pennies (V is 1 if two coins
    show the same side, else -1) has none, and the player who moves second wins."""
    games = torch.randint(10, (1000, 4, 5))
    max_min, min_max = both_orders(games)
    saddle = (games == games.amin(1, keepdim=True)) & (games == games.amax(2, keepdim=True))
    saddle = saddle.flatten(1).any(dim=1)
    below, above = (v.item() for v in both_orders(torch.tensor([[[1, -1], [-1, 1]]])))
    return agree(1000, ((max_min == min_max) == saddle).sum().item(), "of 1000 games",
                 note=f"{saddle.sum()} have one; pennies: {below} and {above}",
                 and_also=0 < saddle.sum().item() < 1000 and below < above)


@holds
def minimax_bound():
    """max_D min_G V <= min_G max_D V.

    This half of the claim above needs no equilibrium: the player who moves second knows more."""
    max_min, min_max = both_orders(normal(1000, 4, 5))
    return agree(1000, (max_min <= min_max).sum().item(), "of 1000 games")


@holds
def maximin_collapse():
    """For a fixed D, G's best q is all on argmax D: a G trained to the end against it has one mode.

    V is linear in q and concave in D, so over distributions both orders give -log 4: q = p and
    D = 1/2 are a saddle point. Over weights they need not: a G that can draw only one picture has
    the same max min, as one is enough against a fixed D, but min max = 2 JSD - log 4, above it.
    Gradient steps do not say which order they follow, and max min may draw one picture."""
    p, D, half = normal(6).softmax(0), torch.rand(6).double(), double(6 * [0.5])
    points, others = torch.eye(6).double(), normal(100, 6).softmax(1)
    collapsed = gan_value(D, p, points[D.argmax()]).item()
    lowest = min(gan_value(D, p, q).item() for q in others)
    saddle = (all(abs(gan_value(half, p, q) + math.log(4)) < ROUNDING for q in others)
              and all(gan_value(one, p, p) <= -math.log(4) for one in torch.rand(100, 6).double()))
    min_max = min(gan_value(p / (p + q), p, q).item() for q in points)
    expected = min(2 * jensen_shannon(p, q).item() for q in points) - math.log(4)
    return (f"below {lowest:.3f}, the best of 100", f"{collapsed:.3f} (one picture: min max "
            f"{min_max:.3f}, max min {-math.log(4):.3f})",
            collapsed < lowest and saddle and abs(min_max - expected) < ROUNDING
            and min_max > -math.log(4) + 0.1)


def bilinear_step(x, y, eta, k=0, exact=True, alternating=False, r1=0.0):
    """One step of the game V = x y - r1 y²/2 with rate eta, by autograd: x descends, y ascends.

    y looks k steps ahead, to y_k, and x descends on x y_k. exact: the gradient also goes back
    through those steps; otherwise y_k is a constant ("rollback": y is moved, then put back). y's
    own step starts from y and uses the old x, or, if alternating, the new one. r1: weight of the
    R1 penalty, in y's own step and in those that it looks ahead. Here D's score is linear with
    slope y, so the penalty is the square of y. x and y are float64 scalar tensors, and so is the
    pair that is returned, the new x and y, without a graph."""
    x = x.detach().requires_grad_()
    y_k = y
    for _ in range(k):
        y_k = y_k + eta * ((x if exact else x.detach()) - r1 * y_k)  # ∂V/∂y = x - r1 y
    x_new = x - eta * torch.autograd.grad(x * y_k, x)[0]
    return x_new.detach(), y + eta * ((x_new if alternating else x).detach() - r1 * y)


def momentum_step(x, y, x_before, y_before, eta, momentum, alternating=True):
    """One step of the game V = x y with the heavy ball: a gradient step with rate eta plus
    `momentum` times the player's last move, which for x is x - x_before, and for y likewise.

    x descends and y ascends. y's gradient is the old x or, if alternating, the new one. Takes
    numbers or scalar tensors. Returns four: the new x, the new y, the old x, the old y."""
    x_new = x - eta * y + momentum * (x - x_before)
    y_new = y + eta * (x_new if alternating else x) + momentum * (y - y_before)
    return x_new, y_new, x, y


def growth(step, n):
    """The largest modulus of the eigenvalues of step, a linear map of n numbers: a number.

    step takes n float64 scalar tensors and returns n. In the long run every step multiplies the
    distance to the solution 0 by the result."""
    columns = [torch.stack(step(*unit)) for unit in torch.eye(n, dtype=torch.float64)]
    return torch.linalg.eigvals(torch.stack(columns, dim=1)).abs().max().item()


def bilinear_growth(eta, **kind):
    """growth() of bilinear_step(x, y, eta, **kind), as a number."""
    return growth(lambda x, y: bilinear_step(x, y, eta, **kind), 2)


def momentum_growth(eta, momentum, alternating=True):
    """growth() of momentum_step(x, y, x_before, y_before, eta, momentum, alternating): a number."""
    return growth(lambda *state: momentum_step(*state, eta, momentum, alternating), 4)


@holds
def bilinear_game():
    """On V = x y rollback unrolling works from k = 2 if both move at once, from k = 1 if in turn.

    Unrolling shows x the next k steps of y; rollback is without the gradient through them. For
    (k + 1/2) η < 1 a step turns the plane, and multiplies the
    distance to (0, 0) by the root of its determinant. Both at once: 1 + η² (plain), 1 - (2k - 1) η²
    (exact), 1 - (k - 1) η² (rollback). In turn, as in chapter 03 and in nearly all training: 1
    (plain, which circles), 1 - 2k η², 1 - k η². The course found k >= 2 by experiment, for
    rollback; it trains in turn, so this game does not explain it."""
    eta, pairs, works = 0.1, [], {False: [], True: []}
    for in_turn, k in itertools.product((False, True), range(6)):
        exact, rollback = (bilinear_growth(eta, k=k, exact=how, alternating=in_turn)
                           for how in (True, False))
        pairs += [(1 - (2 * k - (not in_turn)) * eta ** 2, exact),
                  (1 - (k - (not in_turn)) * eta ** 2, rollback)]
        if rollback < 1 - ROUNDING:
            works[in_turn].append(k)
    roots = all(abs(det ** 0.5 - growth) < ROUNDING for det, growth in pairs)
    plain, plain_in_turn = (bilinear_growth(eta, alternating=how) for how in (False, True))
    at_once, in_turn = works[False], works[True]
    return ("from k = 2, 1", f"from k = {min(at_once, default='none')}, "
            f"{min(in_turn, default='none')} (plain {plain:.4g}, in turn {plain_in_turn:.4g})",
            roots and at_once == [2, 3, 4, 5] and in_turn == [1, 2, 3, 4, 5])


@holds
def momentum_game():
    """On V = x y, in turn, momentum 0.5 makes a circle a growing spiral, -0.3 a shrinking one.

    Gidel et al. 2019, arXiv:1807.04740. Each number is the factor by which a step multiplies the
    distance to (0, 0), in the long run. Without momentum the game in turn circles. The momentum
    that is usual for a GAN, Adam's beta1 = 0.5, is enough to lose it. Chapter 03 finds the same on
    the ring: with momentum the plain GAN collapses, without momentum it covers all modes."""
    circle, outwards, inwards = (momentum_growth(0.1, m) for m in (0.0, 0.5, -0.3))
    return ("1, above 1, below 1", f"{circle:.4f}, {outwards:.4f}, {inwards:.4f}",
            abs(circle - 1) < 1e-6 and outwards > 1.01 and inwards < 0.999)


@holds
def r1_game():
    """On V = x y an R1 penalty of weight 2 k η damps exactly as k exactly unrolled steps do.

    One report asks whether R1 would suit an unrolled GAN. In this game one can replace the other:
    both steps have the determinant 1 - η γ + η² at once and 1 - η γ in turn, γ = 2 k η, and the
    same trace, hence the same eigenvalues. R1 (Mescheder et al. 2018) pulls y, the weight of D, to
    0; unrolling pulls x, the weight of G. R1 needs no second pass through D for each step of k."""
    eta, pairs, determinants = 0.1, [], []
    for in_turn, k in itertools.product((False, True), range(1, 6)):
        steps = [torch.stack([torch.stack(bilinear_step(*unit, eta, alternating=in_turn, **kind))
                              for unit in torch.eye(2, dtype=torch.float64)], dim=1)
                 for kind in (dict(k=k), dict(r1=2 * k * eta))]
        pairs += [(torch.linalg.det(steps[0]), torch.linalg.det(steps[1])),
                  (steps[0].trace(), steps[1].trace())]
        determinants.append((1 - 2 * k * eta ** 2 + (not in_turn) * eta ** 2,
                             torch.linalg.det(steps[1]).item()))
    return equal(*pairs, note=f"k = 5, in turn: determinant {determinants[-1][1]:.2f}",
                 and_also=all(abs(a - b) < ROUNDING for a, b in determinants))


@figure("bilinear", "V = x y: x descends, y ascends, η = 0.1, 150 steps from the black dot",
        panels=8, rows=2, width=3, height=3.6)
def draw_bilinear(*panels):
    kinds = {"plain": {}, "rollback, k = 1": dict(k=1, exact=False),
             "rollback, k = 2": dict(k=2, exact=False), "exact, k = 1": dict(k=1),
             "in turn": dict(alternating=True),
             "in turn, rollback, k = 1": dict(k=1, exact=False, alternating=True)}
    games = {name: (functools.partial(bilinear_step, eta=0.1, **kind), 2)
             for name, kind in kinds.items()}
    games |= {f"in turn, momentum {m}": (functools.partial(momentum_step, eta=0.1, momentum=m), 4)
              for m in (0.5, -0.3)}
    for ax, (name, (step, n)) in zip(panels, games.items()):
        path = [(double(1.0), double(0.0)) * (n // 2)]
        while len(path) < 151 and max(map(abs, path[-1])) < 2.2:
            path.append(step(*path[-1]))
        ax.plot(*torch.tensor(path)[:, :2].T, linewidth=1)
        ax.plot(1, 0, "o", color="black", markersize=4)
        ax.set(title=f"{name}\ndistance times {growth(step, n):.3f} per step", aspect="equal",
               xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xlabel="x", ylabel="y")


def wasserstein_1d(x, y):
    """W1 of two samples of equal size on the line: mean |x_(i) - y_(i)| of the sorted values.

    x, y: [n]. Raises ValueError for other shapes, and for n = 0."""
    if x.ndim != 1 or x.shape != y.shape or len(x) == 0:
        raise ValueError(f"x and y must be [n] both, not {tuple(x.shape)} and {tuple(y.shape)}")
    return (x.sort().values - y.sort().values).abs().mean()


@holds
def js_vs_w1():
    """Two parallel lines at distance d: JSD = log 2 for every d ≠ 0, W1 = d.

    Arjovsky et al. 2017, example 1: this is why a WGAN has a gradient where a GAN has none. W1 is
    the distance by which probability must move. Only the direction across the lines matters, and
    there each line is one point."""
    cells = torch.eye(21, dtype=torch.float64)  # row d: a distribution that is all in cell d
    pairs = []
    for d in range(1, 21):
        pairs += [(jensen_shannon(cells[0], cells[d]), math.log(2)),
                  (wasserstein_1d(torch.zeros(100), torch.full((100,), d)), d)]
    return equal((jensen_shannon(cells[0], cells[0]), 0), *pairs)


@figure("js_w1", "Two parallel lines at distance d")
def draw_js_w1(ax):
    d = torch.linspace(-1, 1, 201)
    ax.plot(d, torch.full_like(d, math.log(2)), "C0", label="JSD: log 2, but 0 at 0; no slope")
    ax.plot(0, math.log(2), "o", color="C0", markerfacecolor="white")
    ax.plot(d, d.abs(), "C1", label="W1: slope 1")
    ax.plot(0, 0, "o", color="C0")
    ax.set(xlabel="d (its sign: on which side)", ylabel="JSD in nats, W1 in units of d",
           xticks=[-1, -0.5, 0, 0.5, 1])


def gradient_penalty(critic, x):
    """mean (‖∇_x critic(x)‖ - 1)², x [B, ...] (Gulrajani et al. 2017, eq. 3), a scalar tensor.

    critic: [B, ...] -> [B], each value of its own example; the norm is over all entries of one.
    create_graph keeps the graph of the gradient, so that the penalty can train the critic."""
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()


@holds
def gp_linear():
    """A linear critic f(x) = w.x has the gradient penalty (‖w‖ - 1)²; a zero critic has 1.

    The gradient is w everywhere. A penalty of 0 for a critic that does nothing has lost its -1. The
    gradient of the penalty in w must be 2 (1 - 1/‖w‖) w, or the penalty trains nothing."""
    x, w = normal(16, 5), normal(5)
    trains = gradient(lambda w: gradient_penalty(lambda x: x @ w, x), w)
    return equal((gradient_penalty(lambda x: x @ w, x), (w.norm() - 1) ** 2),
                 (gradient_penalty(lambda x: x @ (0 * w), x), 1),
                 (trains, 2 * (1 - 1 / w.norm()) * w))


def power_iteration(w, n_iter, u):
    """Largest singular value of w [n, m], from below: uᵀ W v after n_iter >= 1 rounds of
    v <- Wᵀu / ‖Wᵀu‖, u <- W v / ‖W v‖, from a unit vector u [n] (Miyato et al. 2018, alg. 1)."""
    for _ in range(n_iter):
        v = F.normalize(w.T @ u, dim=0)
        u = F.normalize(w @ v, dim=0)
    return u @ w @ v


@holds
def spectral():
    """Power iteration converges to the largest singular value from below.

    uᵀ W v of unit vectors never exceeds it, and each round can only raise it."""
    w, u = normal(8, 5), F.normalize(normal(8), dim=0)
    largest = torch.linalg.svdvals(w)[0].item()
    sigmas = torch.stack([power_iteration(w, n, u) for n in (1, 2, 4, 8, 2000)])
    rises = (sigmas.diff() > -ROUNDING).all()
    return agree(largest, sigmas[-1].item(), tolerance=1e-6,
                 and_also=rises and (sigmas <= largest + ROUNDING).all())


# --- samples and scores ------------------------------------------------------------------------

topic("samples and scores", """
    Is a sample good, and who says so? A score squeezes many pictures into one number, so it has
    bounds and blind spots: two different distributions can get the same score. The scores here are
    moments, the MMD (a distance between distributions, made of a kernel), and the Inception score
    (IS) and the FID, which look at pictures through a classifier. The last claims are about how
    samples are made: truncated noise, the statistics of a batch, the size of a network.""")


def weighted_mmd(x, weights_x, y, weights_y):
    """MMD² of two weighted point sets on the line, kernel k(a, b) = 1 / (1 + (a - b)²); 0 if equal.

    x, weights_x [n]; y, weights_y [m]. E k(x, x') + E k(y, y') - 2 E k(x, y), by double sums."""
    def mean(a, weights_a, b, weights_b):
        return weights_a @ (1 / (1 + (a[:, None] - b) ** 2)) @ weights_b

    return (mean(x, weights_x, x, weights_x) + mean(y, weights_y, y, weights_y)
            - 2 * mean(x, weights_x, y, weights_y))


def normal_points(n):
    """N(0, 1) as n points and their weights 1 / n: the quantiles of (i + 1/2) / n, i = 0..n-1."""
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(middle), torch.full((n,), 1 / n, dtype=torch.float64)


@refuted
def moments_not_gaussian():
    """Mean 0, variance 1 and kurtosis 3 make a Gaussian.

    The course uses them so, as the loss of its Wasserstein autoencoder (chapter 06). But a z that
    is -√3, 0 or √3 with probabilities 1/6, 2/3, 1/6 has all three. An MMD tells it from N(0, 1)."""
    z, probability = double(THREE_POINTS), double(THREE_WEIGHTS)
    sample = z.repeat_interleave((600 * probability).round().long())  # 100, 400 and 100 times
    mean, variance, kurtosis = (m.item() for m in moments(sample[:, None]))
    apart = weighted_mmd(z, probability, *normal_points(2000)).item()
    same = abs(weighted_mmd(*normal_points(1999), *normal_points(2000)).item())  # normal and normal
    return ("MMD² 0", f"moments {abs(mean):.0f}, {variance:.4g}, {kurtosis:.4g}; MMD² {apart:.2g} "
            f"(normal: {same:.0e})",
            abs(mean) < ROUNDING and abs(variance - 1) < ROUNDING and abs(kurtosis - 3) < ROUNDING
            and apart > 100 * same)


@figure("three_points", "Both: mean 0, variance 1, kurtosis 3")
def draw_three_points(ax):
    z = torch.linspace(-4, 4, 200)
    ax.plot(z, (-z ** 2 / 2).exp() / math.sqrt(2 * math.pi), label="N(0, 1): density")
    ax.stem(THREE_POINTS, THREE_WEIGHTS, linefmt="C1-", markerfmt="C1o", basefmt=" ",
            label="three points: probability")
    ax.set(xlabel="z", ylabel="density, or probability", ylim=(0, 0.8))


def inception_score(probs):
    """IS = exp(mean_x KL(p(y given x) ‖ p(y))), p(y) the mean; probs [N, K], rows sum to 1.

    Returns a scalar tensor."""
    p_y = probs.mean(dim=0)
    kl = (torch.special.xlogy(probs, probs) - torch.special.xlogy(probs, p_y)).sum(dim=1)
    return kl.mean().exp()


@holds
def inception_bounds():
    """1 <= IS <= K, the number of classes, with both reached.

    Salimans et al. 2016. log IS is the mutual information of picture and class: 0 if all pictures
    get the same answer, log K if each answer is sure and all classes are equally frequent."""
    k = 10
    lowest = inception_score(normal(k).softmax(0).expand(50, k)).item()
    highest = inception_score(torch.eye(k, dtype=torch.float64).repeat(5, 1)).item()
    between = [inception_score((3 * normal(50, k)).softmax(1)).item() for _ in range(100)]
    return ("1 <= IS <= 10",
            f"{lowest:.4g}, {min(between):.3g} to {max(between):.3g}, {highest:.4g}",
            abs(lowest - 1) < ROUNDING and abs(highest - k) < ROUNDING
            and all(1 < score < k for score in between))


def frechet_distance(mu_a, cov_a, mu_b, cov_b):
    """‖mu_a - mu_b‖² + tr(A + B - 2 (A^½ B A^½)^½): squared W2 of Gaussians, mu [d], cov [d, d].

    A and B are the covariances, A^½ is the root of a matrix: A^½ A^½ = A. Dowson, Landau 1982;
    Heusel et al. 2017 take it over the features of an Inception network and call it FID. Raises
    ValueError if the shapes do not fit, or if an entry is not finite."""
    if not (mu_a.shape == mu_b.shape and cov_a.shape == cov_b.shape == (*mu_a.shape, *mu_a.shape)):
        raise ValueError("mu [d] and cov [d, d] do not fit: "
                         f"{[tuple(a.shape) for a in (mu_a, cov_a, mu_b, cov_b)]}")
    if not all(a.isfinite().all() for a in (mu_a, cov_a, mu_b, cov_b)):
        raise ValueError("some entries are not finite")
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mu_a - mu_b).pow(2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross


@holds
def fid_gaussians():
    """FID of two Gaussians: 0 for equal ones, ‖Δmu‖² + Σ (√a - √b)² if the covariances commute.

    The course says in words that it has a closed form. Covariances commute if they share their
    eigenvectors: the check turns two diagonal ones, with entries a and b, by the same rotation."""
    turn = torch.linalg.qr(normal(4, 4))[0]
    a, b, shift = torch.rand(4).double(), torch.rand(4).double(), normal(4)
    cov_a, cov_b = turn * a @ turn.T, turn * b @ turn.T
    expected = shift.pow(2).sum() + (a.sqrt() - b.sqrt()).pow(2).sum()
    return equal((frechet_distance(shift, cov_a, 0 * shift, cov_b), expected),
                 (frechet_distance(shift, cov_a, shift, cov_a), 0))


def truncated_normal_variance(limit):
    """Variance of N(0, 1) given |z| <= limit: 1 - 2 t φ(t) / (2 Φ(t) - 1), t = limit > 0; a number.

    limit may be inf, which gives 1. For t <= 1 it is computed by a series, because the difference
    would lose all digits of a small t: 2 Φ(t) - 1 = 2 t φ(t) s with s = 1 + t²/3 + t⁴/(3·5) + ...,
    so the variance is 1 - 1/s = (s - 1)/s. Raises ValueError for a limit not above 0."""
    if not limit > 0:
        raise ValueError(f"nothing lies within ±{limit}")
    if limit <= 1:
        term, rest = 1.0, 0.0
        for odd in range(3, 40, 2):
            term *= limit ** 2 / odd
            rest += term
        return rest / (1 + rest)
    t = min(limit, 40.0)  # where φ(t) is 0 in float64; inf times 0 would be nan
    density = math.exp(-t ** 2 / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * t * density / math.erf(t / math.sqrt(2))


@holds
def truncation():
    """Truncating z lowers its variance, the more, the lower the threshold.

    The course says yes, with quality up and diversity down (Brock et al. 2019); the pictures of
    chapter 07 do not get better. The formula (φ: density, Φ: its integral) must equal a sum."""
    pairs = []
    for limit in (0.5, 1.0, 2.0):
        z = limit * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        density = (-z ** 2 / 2).exp()
        pairs.append((truncated_normal_variance(limit), (density @ z ** 2 / density.sum()).item()))
    expected, measured = (", ".join(f"{v:.4f}" for v in side) for side in zip(*pairs))
    return (expected, measured, all(abs(a - b) < ROUNDING for a, b in pairs)
            and pairs[0][0] < pairs[1][0] < pairs[2][0] < 1)


def merge_batch_statistics(counts, means, variances):
    """Mean and (population) variance [C] of the joined batch from those of its R parts.

    counts [R] of any type, means and variances [R, C]. mean = Σ n_r m_r / n and variance =
    Σ n_r (v_r + (m_r - mean)²) / n: the spread inside the parts and that between them (Chan et al.
    1979). Empty parts, whose own mean is nan, do not count. Raises ValueError if all are empty, or
    if the shapes do not fit."""
    if means.shape != variances.shape or means.ndim != 2 or counts.shape != means.shape[:1]:
        raise ValueError(f"counts {tuple(counts.shape)}, means {tuple(means.shape)} and variances "
                         f"{tuple(variances.shape)} do not fit")
    if not counts.sum() > 0:
        raise ValueError(f"counts {counts.tolist()}: all parts are empty")
    means, variances = means[counts > 0], variances[counts > 0]
    share = counts[counts > 0, None].to(means) / counts.sum()
    mean = (share * means).sum(dim=0)
    return mean, (share * (variances + (means - mean) ** 2)).sum(dim=0)


@holds
def cross_replica_bn():
    """Batch norm with statistics merged over all devices is batch norm of the joined batch.

    The course says yes. A device has a part of the batch, here 8, 8 or 4 samples. Normalising each
    part with its own statistics hides how the parts differ."""
    x = normal(20, 3) + torch.arange(20)[:, None] // 8
    parts = x.split(8)
    mean, variance = merge_batch_statistics(
        torch.tensor([8, 8, 4]).double(), torch.stack([p.mean(0) for p in parts]),
        torch.stack([p.var(0, correction=0) for p in parts]))
    joined = F.batch_norm(x, None, None, training=True)
    alone = torch.cat([F.batch_norm(part, None, None, training=True) for part in parts])
    apart = (alone - joined).abs().max().item()
    return equal(((x - mean) / (variance + 1e-5).sqrt(), joined),  # 1e-5: torch's default
                 note=f"each alone: {apart:.2f}", and_also=apart > 0.1)


def unrolled_networks():
    """G and D of the coursework's unrolled GAN (chapter 03), without their activations.

    Reconstructed: the sizes fit the numbers of parameters that the report names."""
    G = nn.Sequential(nn.Linear(50, 500), nn.Linear(500, 500), nn.Linear(500, 784),
                      nn.ConvTranspose2d(16, 16, kernel_size=4, stride=2, padding=1),   # 7 to 14
                      nn.ConvTranspose2d(16, 8, kernel_size=4, stride=2, padding=1),    # to 28
                      nn.ConvTranspose2d(8, 1, kernel_size=3, padding=1))
    D = nn.Sequential(nn.Linear(784, 1024), nn.Linear(1024, 512), nn.Linear(512, 256),
                      nn.Linear(256, 1))
    return G, D


row("parameter-counts",
    """The coursework's unrolled-GAN networks (chapter 03) have 675,025 and 1,460,225 parameters.

    A report says so. The layers here were chosen to fit these numbers, so the check shows that such
    networks exist. A linear layer has (in + 1) out parameters, a transposed convolution with a
    k x k kernel has in out k² + out.""",
    [675_025, 1_460_225],
    lambda: [sum(p.numel() for p in net.parameters()) for net in unrolled_networks()])


# --- main --------------------------------------------------------------------------------------

def run(name, seeds):
    """What a claim's check returns, and for how many of `seeds` its evidence confirms the verdict.

    Of several outcomes it returns the first one that does not confirm it; if all do, the first."""
    outcomes = []
    for seed in seeds:
        torch.manual_seed(seed)
        outcomes.append(CLAIMS[name].check())
    wrong = [outcome for outcome in outcomes if outcome[2] is not True]  # nan is not True either
    return (wrong or outcomes)[0], len(outcomes) - len(wrong)


def statement(check):
    """The first paragraph of a check's docstring, on one line."""
    return " ".join(check.__doc__.strip().split("\n\n")[0].split())


def reason(check):
    """The second paragraph, on lines of 80 characters."""
    return textwrap.fill(" ".join(check.__doc__.strip().split("\n\n")[1].split()), 80)


def checked(name, seeds):
    """The table's row of a claim, and whether the evidence confirms its verdict for all seeds."""
    (expected, measured, _), confirmed = run(name, seeds)
    text = CLAIMS[name].verdict
    if confirmed < len(seeds):
        text = f"not confirmed: {text} expected ({confirmed} of {len(seeds)} seeds)"
    return [name, expected, measured, text], confirmed == len(seeds)


def answer():
    """What the reader answers: "holds", "refuted", "" to skip, or None to end."""
    words = {"h": "holds", "holds": "holds", "r": "refuted", "refuted": "refuted", "": ""}
    while True:
        print("holds or refuted? (h/r; q ends)", flush=True)
        try:
            line = input().strip().lower()
        except (EOFError, RuntimeError):  # the input has ended, or was closed from the start
            return None
        if line == "q":
            return None
        if line in words:
            return words[line]
        print("h or r; an empty line skips the claim")


def predict(names, seed):
    """Asks what becomes of each claim before it checks it, with one seed, and counts the hits."""
    right = asked = 0
    for i, name in enumerate(names, 1):
        print(f"\n{i} of {len(names)}: {name}\n{textwrap.fill(statement(CLAIMS[name].check), 80)}")
        guess = answer()
        if guess is None:
            print()
            break
        if guess:
            asked += 1
            right += guess == CLAIMS[name].verdict
            print(f"{'right' if guess == CLAIMS[name].verdict else 'wrong'}\n"
                  f"{reason(CLAIMS[name].check)}")
            common.print_table(["claim", "expected", "measured", "verdict"],
                               [checked(name, [seed])[0]])
    print(f"\nyou were right on {right} of {asked}")


def parse_args(argv=None):
    p = common.parser(__doc__, __file__, trains=False)
    g = p.add_argument_group("claims")
    g.add_argument("--only", nargs="+", metavar="ID", help="check only these claims, no pictures")
    g.add_argument("--predict", action="store_true", help="a quiz: you say first what comes out")
    g.add_argument("--list", action="store_true", help="say what each claim states, check nothing")
    args = common.parse(p, argv, quick={})
    unknown = [name for name in args.only or [] if name not in CLAIMS]
    if unknown:
        near = difflib.get_close_matches(unknown[0].replace("_", "-"), CLAIMS, n=1)
        common.fail(f"no claim is called {unknown[0]!r}: see --list"
                    + "".join(f"; did you mean {name}?" for name in near))
    return args


def check_and_print(names, seeds):
    """Checks the claims, prints a table for each topic; returns the claims without evidence."""
    show, rows, unexpected = common.progress("checks", len(names)), {}, []
    for step, name in enumerate(names, 1):
        rows[name], confirmed = checked(name, seeds)
        if not confirmed:
            unexpected.append(name)
        show(step)
    for topic_name, introduction in TOPICS.items():
        mine = [rows[name] for name in rows if CLAIMS[name].topic == topic_name]
        if mine:
            print(f"\n{topic_name}\n{textwrap.fill(introduction, 80)}\n")
            common.print_table(["claim", "expected", "measured", "verdict"], mine)
    print()
    return unexpected


def print_reasons(names):
    """What each claim states, and why it holds or does not."""
    for name in names:
        check = CLAIMS[name].check
        print(f"{name}: {statement(check)}\n{reason(check)}\n")


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        common.print_table(["claim", "verdict", "statement"], [
            [name, claim.verdict, statement(claim.check)] for name, claim in CLAIMS.items()])
        return
    seeds = range(args.seed, args.seed + (1 if args.quick else SEEDS))
    names = [name for name in CLAIMS if name in (args.only or CLAIMS)]
    if args.predict:
        predict(names, args.seed)
        return
    with common.Run(args):
        unexpected = check_and_print(names, seeds)
        if args.only:
            print_reasons(names)
        else:
            for name, how in FIGURES.items():
                save_figure(args.out / f"{name}.png", *how)
        if unexpected:
            common.fail(f"not the expected verdict: {', '.join(unexpected)}", status=1)
    print(f"verdicts as expected: {len(names)} of {len(names)}, seeds for each: {len(seeds)}")


if __name__ == "__main__":
    common.as_script(main)
