"""Names for branches that were given none."""

from __future__ import annotations

from timeline.clock import Clock

_ADJECTIVES = """
able amber ample ashen azure bold brave brief brisk broad calm candid clear clever cool coral crisp
curious dapper deep deft dry eager early earnest easy even fair fast fine firm fleet fond frank free
fresh gentle glad golden grand green hardy hazel honest humble ivory jolly keen kind large late lean
light lively loyal lucid lucky mellow merry mild misty modest neat nimble noble olive open pale
patient plain polite prime proud quick quiet rapid rare ready rosy round royal rustic sharp shy
silent silver simple sleek smart smooth snug sober soft solid spare steady still stout sunny swift
tame tawny tidy tidal tiny topaz vast vivid warm wide wise witty
"""
_NOUNS = """
acorn alder anchor apple arbor ash aspen badger barley basin bay beacon beaver beech birch bison
bluff bough branch breeze brook canyon cedar cherry cliff cloud clover comet coral cove crane creek
cypress dale delta dune eagle elder elm ember falcon fern field finch fjord flint forest fox garden
glade glen grove gull harbor hare hawk hazel heath heron hill holly island ivy jay juniper lake
larch lark laurel leaf lily linden lynx maple marsh marten meadow mesa mint moor moss oak orchard
osprey otter owl peach pear pebble pine plover plum pond poplar quail quartz raven reed reef ridge
river robin rowan sage shore sparrow spring spruce stone stork stream swan thistle thrush tide trail
valley violet walnut willow wren yarrow yew
"""


def generate_name(clock: Clock) -> str:
    """A name such as ``quiet-heron``; some 12,000 of them, so the caller tries again when one is taken."""
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    return f"{adjectives[int(clock.random() * len(adjectives))]}-{nouns[int(clock.random() * len(nouns))]}"
