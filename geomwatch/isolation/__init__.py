"""A probe leaves no trace: what is switched off, set up and put back around it, bit for bit.

May import errors. A newcomer would change something here when training sees a
probe after all (`snapshot`, `saved`: what is put back), or when a part of torch turns out to have
no second derivative (`twice_differentiable`). `state` is the other half of leaving no trace: what
a resumed run takes over, declared beside the attribute.
"""
