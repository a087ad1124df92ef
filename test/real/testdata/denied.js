// Sends one request and prints status and body: node denied.js 1|2 URL HOST PORT FOLDER BODY EXPECT
const [version, path, host, port, folder, size, expect] = process.argv.slice(2);
const fs = require('fs');
const net = require('net');
const tls = require('tls');
const files = { cert: fs.readFileSync(folder + '/svid.pem'), key: fs.readFileSync(folder + '/key.pem'), ca: fs.readFileSync(folder + '/ca.pem') };
const body = JSON.stringify({ model: 'm', a: 'x'.repeat(+size) });
const headers = { 'content-type': 'application/json' };
if (expect) headers.expect = '100-continue';
const print = (status, text) => process.stdout.write(status + ' ' + text);
const connect = (alpn) => tls.connect({ host: '127.0.0.1', port, servername: host, ALPNProtocols: [alpn], ...files });

if (version === '1') {
  const req = require('https').request({ method: 'POST', path, host, headers: { ...headers, host, 'content-length': body.length },
    createConnection: () => connect('http/1.1') }, (res) => {
    let text = '';
    res.setEncoding('utf8').on('data', (d) => { text += d; }).on('end', () => { print(res.statusCode, text); process.exit(); });
  });
  if (expect) { req.on('continue', () => req.end(body)); req.flushHeaders(); } else req.end(body);
} else {
  const session = require('http2').connect('https://' + host, { maxSessionMemory: 64, createConnection: () => connect('h2') });
  const req = session.request({ ':method': 'POST', ':path': path, ...headers });
  let status = 0, text = '';
  req.on('response', (h) => { status = h[':status']; });
  req.setEncoding('utf8').on('data', (d) => { text += d; }).on('end', () => { print(status, text); process.exit(); });
  req.end(body);
}
