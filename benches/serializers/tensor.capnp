# A request with tensors, for capnproto.py.
@0xd6a1b8f2c3e94a57;

struct Tensor {
  dtype @0 :Text;
  shape @1 :List(UInt64);
  data @2 :Data;
}

struct Message {
  op @0 :Text;
  layer @1 :Int64;
  scale @2 :Float64;
  tensors @3 :List(Tensor);
}
