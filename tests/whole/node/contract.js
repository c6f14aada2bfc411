// The contract as Node reads it, and pieces of messages written by hand.
const grpc = require("@grpc/grpc-js");
const { loadSync } = require("@grpc/proto-loader");

const definition = loadSync(["lossd/v1/loss_service.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"], {
  includeDirs: process.env.PROTO_PATH.split(":"),
  keepCase: true,
  longs: Number,
  enums: String,
});

const UNLIMITED = { "grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1 };

function varint(value) {
  const bytes = [];
  for (; value >= 128; value = Math.floor(value / 128)) bytes.push((value % 128) + 128);
  return Buffer.from([...bytes, value]);
}

// A field with content: the parts of a message, or bytes.
function field(number, ...parts) {
  const length = parts.reduce((sum, part) => sum + part.length, 0);
  return Buffer.concat([varint(number * 8 + 2), varint(length), ...parts]);
}

const integer = (number, value) => Buffer.concat([varint(number * 8), varint(value)]);

const unknown = field(1000, Buffer.from("of a later version"));

// A tensor as no library writes it: backwards, its shape not packed, its storage set twice.
function oddTensor(number, dtype, shape, content) {
  const extents = shape.map((extent) => integer(2, extent));
  return field(number, field(3, Buffer.from("overruled")), field(3, content), ...extents, unknown, integer(1, dtype));
}

const { lossd, google } = grpc.loadPackageDefinition(definition);
module.exports = { grpc, definition, UNLIMITED, field, integer, unknown, oddTensor, v1: lossd.v1, rpc: google.rpc };
