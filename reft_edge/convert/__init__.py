"""Adapters of other libraries, read and written: pyreft, control vectors of llama.cpp and repeng, and stock
`.onnx_adapter` files; AdapterHub's read, and EasySteer's written.

What a format does not store is asked for, never guessed, and what cannot be carried is refused by name.
"""
