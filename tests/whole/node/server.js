// A server that is not lossd: its gradient is the input itself, and its answers are in an odd form.
const { grpc, UNLIMITED, field, integer, unknown, oddTensor, v1, rpc } = require("./contract.js");

const FLOAT32 = 1;

function answer(request) {
  const { inputs } = request.items[0].focal;
  const gradient = [oddTensor(2, FLOAT32, inputs.shape, inputs.inline), field(1, Buffer.from("inputs"))];
  const loss = oddTensor(1, FLOAT32, [], inputs.inline.subarray(0, 4));
  const timings = field(2, integer(3, 7));
  return Buffer.concat([timings, unknown, field(1, field(6, ...gradient), integer(3, 5), loss)]);
}

function refusal() {
  const info = { domain: "lossd", reason: "INVALID_OPTION", metadata: { field: "focal.gamma", value: "9" } };
  const detail = { type_url: "type.googleapis.com/google.rpc.ErrorInfo", value: rpc.ErrorInfo.serialize(info) };
  const code = grpc.status.INVALID_ARGUMENT;
  const metadata = new grpc.Metadata();
  const status = { code, message: "focal.gamma: is 9", details: [detail] };
  metadata.set("grpc-status-details-bin", rpc.Status.serialize(status));
  return { code, details: status.message, metadata };
}

const computeLoss = { ...v1.LossService.service.ComputeLoss, responseSerialize: (bytes) => bytes };
const service = { ...v1.LossService.service, ComputeLoss: computeLoss };

const server = new grpc.Server(UNLIMITED);
server.addService(service, {
  GetServerInfo: (_call, callback) => callback(null, { version: "node", max_message_bytes: 2 ** 31 - 1 }),
  ComputeLoss: ({ request }, callback) =>
    request.focal.gamma === 9 ? callback(refusal()) : callback(null, answer(request)),
  // Odd ones last.
  ComputeLossStream: (call) => {
    const late = [];
    const send = ({ id, request }) =>
      call.write({ id, response: v1.ComputeLossResponse.deserialize(answer(request)) });
    call.on("data", (one) => (one.id % 2 ? late.push(one) : send(one)));
    call.on("end", () => {
      late.forEach(send);
      call.end();
    });
  },
});
server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) throw error;
  console.log(port);
});
process.stdin.resume().on("end", () => server.forceShutdown());
